"""The service of rewards on loopback: right answers, and each way to misuse it."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from mellum2_megatron.rlvr import gateway
from mellum2_megatron.rlvr.gateway import Gateway
from tests.cli.runner import mellum2

FORM = {"verifier": "form", "arguments": {"contains": ["a"]}}
MOST = 30


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A service with two workers, room for `MOST` items and a function of one's own."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(
        "import os, time\n"
        "def reward(answer, seconds=0, gate=None):\n"
        "    while gate and not os.path.exists(gate):\n        time.sleep(0.02)\n"
        "    if answer == 'die':\n        os.abort()\n"
        "    if answer == 'leave':\n        os._exit(1)\n"
        "    if answer == 'fail':\n        raise ValueError('no')\n"
        "    time.sleep(seconds)\n"
        "    return 1\n"
        "def other(answer):\n    return 1\n"
    )
    served = Gateway(
        workers=2, most=MOST, own=frozenset({"own.py:reward"}), folder=folder, token="secret"
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(served.application(), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()


def ask(port: int, body: Any, *, token: str = "secret") -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/score", content, {"Authorization": f"Bearer {token}"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def waiting(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    number: int = json.loads(connection.getresponse().read())["waiting"]
    connection.close()
    return number


def own(answer: str, **arguments: Any) -> dict[str, Any]:
    return {"verifier": "own.py:reward", "arguments": arguments, "answer": answer}


def test_verdicts_come_in_order(port: int) -> None:
    items = [{**FORM, "answer": "ba" if number % 3 else "b"} for number in range(20)]
    items.append({"verifier": "math", "arguments": {"answer": "0.5"}, "answer": r"\boxed{1/2}"})
    code, answer = ask(port, {"items": items})
    assert code == 200
    rewards = [verdict["reward"] for verdict in answer["verdicts"]]
    assert rewards == [float(number % 3 > 0) for number in range(20)] + [1.0]
    assert answer["verdicts"][0]["reason"] == "it lacks 'a'"
    assert ask(port, {"items": []}) == (200, {"verdicts": []})


def test_thoughts_and_tools_count(port: int) -> None:
    tools = [{"name": "ping", "parameters": {"type": "object"}}]
    call = '<tool_call>{"name": "ping", "arguments": {}}</tool_call>'
    items = [
        {**FORM, "answer": "<think>a</think>b", "thinking": True},
        {"verifier": "tool_calls", "tools": tools, "answer": call},
    ]
    code, answer = ask(port, {"items": items})
    assert (code, [one["reward"] for one in answer["verdicts"]]) == (200, [0, 1])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "no valid JSON"),
        ([], "JSON object"),
        ({}, "items is missing"),
        ({"items": [1]}, "item 0 is no object"),
        ({"items": [FORM]}, "item 0: answer is missing"),
        ({"items": [{**FORM, "answer": "a"}, {"answer": "a"}]}, "item 1: verifier is missing"),
        ({"items": [{"verifier": "form", "answer": "a"}]}, "item 0: nothing is asked for"),
        ({"items": [{"verifier": "own.py:other", "answer": "a"}]}, "is not offered"),
        ({"items": [{"verifier": "../x.py:f", "answer": "a"}]}, "is not offered"),
        (
            {
                "items": [
                    {
                        "verifier": "all",
                        "answer": "a",
                        "arguments": {"of": [FORM, {"verifier": "own.py:other"}]},
                    }
                ]
            },
            "is not offered",
        ),
        (
            {"items": [{"verifier": "form", "answer": "a", "arguments": {"thoughts": True}}]},
            "without thinking=true",
        ),
        ({"items": [{"verifier": "tool_calls", "tools": [1], "answer": "a"}]}, "'tools'"),
    ],
)
def test_a_bad_request_is_refused(body: Any, message: str, port: int) -> None:
    code, answer = ask(port, body)
    assert (code, list(answer)) == (400, ["error"])
    assert message in answer["error"]


def test_a_verifier_that_fails_is_no_verdict(port: int) -> None:
    assert ask(port, {"items": [own("x")]})[0] == 200
    code, answer = ask(port, {"items": [own("fail")]})
    assert code == 500
    assert "ValueError: no" in answer["error"]
    code, answer = ask(port, {"items": [own("x"), own("leave")]})
    assert (code, answer["error"][:6]) == (500, "item 1")
    assert "its process ends with exit code 1" in answer["error"]
    # An answer that its process could not bear is worth nothing, and the next is served.
    code, answer = ask(port, {"items": [own("die"), own("x")]})
    assert (code, [one["reward"] for one in answer["verdicts"]]) == (200, [0, 1])


def test_without_the_token_nothing_is_done(port: int) -> None:
    for token in ("", "secrets", "secre"):
        assert ask(port, {"items": [{**FORM, "answer": "a"}]}, token=token)[0] == 401


def test_a_flood_is_refused_and_the_rest_is_served(port: int, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = {"items": [own("x", gate=str(gate)) for _ in range(10)]}
    served = MOST // 10
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, port, slow) for _ in range(8)]
        refused = [one.result()[0] for one in itertools.islice(as_completed(asked), 8 - served)]
        gate.touch()
    codes = [one.result()[0] for one in asked]
    assert refused == [503] * (8 - served)
    assert codes.count(200) == served
    code, answer = ask(port, {"items": [own("x")] * (MOST + 1)})
    assert (code, answer["error"].partition(":")[0]) == (413, f"a request has {MOST} items at most")
    assert waiting(port) == 0
    assert ask(port, {"items": [own("x")]})[0] == 200


def test_a_client_that_goes_away_frees_its_places(port: int) -> None:
    body = json.dumps({"items": [own("x", seconds=0.5)] * 4}).encode()
    head = (
        f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body)
        deadline = time.monotonic() + 30
        while not waiting(port):
            assert time.monotonic() < deadline
    while waiting(port):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_client_that_falls_silent_is_let_go(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes count, and a service that ends would wait for it."""
    monkeypatch.setattr(gateway, "BODY_S", 0.2)
    head = (
        b"POST /score HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer secret\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(head + b"Content-Length: 9000\r\n\r\n{")
        said = b""
        while part := client.recv(4096):
            said += part
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"nothing more of the request for 0.2 s" in said


def test_more_connections_than_files_are_served() -> None:
    """Each costs a file, of which a process may open 1,024 unless it asks for more."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = "from mellum2_megatron.cli import main; main()"
    serve = [sys.executable, "-c", program, "rl", "serve", "--port", str(port)]
    shell = ["bash", "-c", 'ulimit -Sn 80; exec "$@"', "bash", *serve]
    with subprocess.Popen(shell) as service, contextlib.ExitStack() as open_ones:
        open_ones.callback(service.kill)
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                waiting(port)
                break
            assert time.monotonic() < deadline
            assert service.poll() is None
            time.sleep(0.1)
        for _ in range(120):
            open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
        code, answer = ask(port, {"items": [{**FORM, "answer": "a"}]})
        assert (code, answer["verdicts"][0]["reward"]) == (200, 1)
        service.terminate()
        assert service.wait(60) in (0, -15)


def test_a_request_that_is_too_large_is_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "LARGEST_REQUEST", 1000)
    assert ask(port, {"items": [{**FORM, "answer": "a" * 1000}]})[0] == 413


def test_requests_of_too_many_bytes_together_are_refused(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,096 items may be as many requests, each of 64 MiB."""
    slow = {"items": [{**own("x", seconds=1.5), "tools": [{"name": "padding" * 40}]}]}
    monkeypatch.setattr(gateway, "MOST_BYTES", 1000)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, port, slow)
        deadline = time.monotonic() + 30
        while not waiting(port):
            assert time.monotonic() < deadline
        code, answer = ask(port, {"items": [{**FORM, "answer": "a" * 800}]})
        assert (code, answer["error"]) == (503, "requests of 1,000 bytes are waiting")
        assert first.result()[0] == 200
    assert ask(port, {"items": [{**FORM, "answer": "a" * 800}]})[0] == 200


def test_large_tasks_are_not_remembered(tmp_path: Path) -> None:
    """4,096 of 64 MiB each would be more than a machine's memory."""
    served = Gateway(workers=1, most=1, own=frozenset(), folder=tmp_path, token=None)
    for text, remembered in (("a", 1), ("a" * (1 << 17), 1), ("b", 2)):
        item = {"verifier": "form", "arguments": {"contains": [text]}, "answer": text}
        assert served._score_one(item).reward == 1
        assert served._check.cache_info().currsize == remembered


def test_beyond_this_machine_a_token_is_needed(tmp_path: Path) -> None:
    mellum2("rl", "serve", "--host", "0.0.0.0").refused("--host 0.0.0.0", "--token-file")
    empty = tmp_path / "token"
    empty.write_text("\n")
    mellum2("rl", "serve", "--host", "0.0.0.0", "--token-file", empty).refused("--token-file")
    mellum2("rl", "serve", "--own", "x.py:f").refused("--own x.py:f")
