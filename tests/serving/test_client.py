"""The client of vLLM's server, against a server that answers as vLLM 0.32 was seen to.

The recorded forms are checked against vLLM itself by `tests.serving.test_vllm`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.serving.client import DraftCounts, Sampling, VllmClient
from mellum2_megatron.serving.command import CPU_WORKER

METRICS = """\
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 137.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 116.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 116.0
"""


class Recorder(ThreadingHTTPServer):
    """Counts upwards from the last token of a prompt; ends at an id that ends in 9."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        self.development = True
        self.device, self.extension = "cuda", ""
        self.metrics = METRICS

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Recorder

    def log_message(self, *_words: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self.path.startswith("/server_info"):
            about = {
                "device_config": {"device": self.server.device},
                "parallel_config": {"worker_extension_cls": self.server.extension},
            }
            found = json.dumps({"vllm_config": about}).encode()
            self._reply(200 if self.server.development else 404, found)
            return
        body = self.server.metrics.encode() if self.path == "/metrics" else b""
        self._reply(200, body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        if self.path != "/v1/completions":
            self._reply(200 if self.server.development else 404, b'{"detail":"Not Found"}')
        elif body["prompt"][0] == 400:
            error = {"message": "maximum context length is 512", "type": "BadRequestError"}
            self._reply(400, json.dumps({"error": error}).encode())
        elif body["prompt"][0] == 500:
            self._stream([{"error": {"message": "engine died", "code": 500}}])
        elif body["prompt"][0] == 600:
            self._reply(200, b'{"choices": [{"text": "no ids"}]}')
        else:
            first = body["prompt"][-1] + 1
            ids = list(range(first, first + body["max_tokens"]))
            ended = "length"
            if not body["ignore_eos"]:
                end = next((place for place, token in enumerate(ids) if token % 10 == 9), None)
                if end is not None:
                    ids, ended = ids[: end + 1], "stop"
            choices = [
                {
                    "index": 0,
                    "text": str(token),
                    "token_ids": [token],
                    "logprobs": {"token_logprobs": [-token / 100]},
                    "finish_reason": None,
                }
                for token in ids
            ]
            if body.get("stream"):
                choices[-1]["finish_reason"] = ended
                self._stream([{"choices": [choice]} for choice in choices])
                return
            whole = {
                "index": 0,
                "token_ids": ids,
                "logprobs": {"token_logprobs": [-token / 100 for token in ids]},
                "finish_reason": ended,
            }
            self._reply(200, json.dumps({"choices": [whole]}).encode())

    def _stream(self, pieces: list[dict[str, Any]]) -> None:
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
        self._reply(200, "".join([*lines, "data: [DONE]\n\n"]).encode())

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Recorder]:
    with Recorder() as recorder:
        thread = threading.Thread(target=recorder.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield recorder
        recorder.shutdown()
        thread.join()


@pytest.mark.parametrize("timed", [False, True])
def test_answers_come_in_the_order_of_prompts(server: Recorder, timed: bool) -> None:
    client = VllmClient(server.url, "m", token="secret")
    sampling = Sampling(max_tokens=4, temperature=0.6, top_p=0.95, top_k=20, seed=7, stop=(3,))
    answers = client.complete([[1, 10 * row] for row in range(1, 6)], sampling, timed=timed)
    assert [answer.tokens for answer in answers] == [
        tuple(range(10 * row + 1, 10 * row + 5)) for row in range(1, 6)
    ]
    assert answers[1].log_probabilities == (-0.21, -0.22, -0.23, -0.24)
    assert {answer.ended for answer in answers} == {"length"}
    assert all((answer.first_token is None) != timed for answer in answers)
    assert all((answer.first_token or 0) <= answer.seconds for answer in answers)
    sent = {body["prompt"][1]: body for _path, body, _token in server.requests}
    assert {prompt: body["seed"] for prompt, body in sent.items()} == {
        10: 7, 20: 8, 30: 9, 40: 10, 50: 11
    }  # fmt: skip
    assert {token for _path, _body, token in server.requests} == {"Bearer secret"}
    # Every value is sent: the folder's generation_config.json would fill in what is not.
    wanted = {
        "model": "m", "max_tokens": 4, "temperature": 0.6, "top_p": 0.95, "top_k": 20,
        "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": False, "stop_token_ids": [3],
        "logprobs": 0, "return_token_ids": True,
    }  # fmt: skip
    assert wanted.items() <= sent[10].items()


def test_the_end_of_a_text_is_its_last_token(server: Recorder) -> None:
    client = VllmClient(server.url, "m")
    (ended,) = client.complete([[17]], Sampling(max_tokens=8))
    assert (ended.tokens, ended.ended) == ((18, 19), "stop")
    (longer,) = client.complete([[17]], Sampling(max_tokens=8, ignore_end=True), timed=True)
    assert (len(longer.tokens), longer.ended) == (8, "length")
    assert client.complete([], Sampling(max_tokens=8)) == []


def test_counts_of_the_draft(server: Recorder) -> None:
    client = VllmClient(server.url, "m")
    assert client.is_up()
    assert client.draft_counts() == DraftCounts(drafted=137, accepted=116)
    server.metrics = "vllm:num_requests_running 0.0\n"
    assert client.draft_counts() is None


@pytest.mark.parametrize(
    ("device", "extension", "method"),
    [("cuda", "", "reload_weights"), ("cpu", CPU_WORKER, "reload_packed_weights")],
)
def test_new_weights(
    server: Recorder, tmp_path: Any, device: str, extension: str, method: str
) -> None:
    server.device, server.extension = device, extension
    VllmClient(server.url, "m").reload(tmp_path)
    call = {"method": method, "kwargs": {"weights_path": str(tmp_path)}}
    assert [(path, body) for path, body, _token in server.requests] == [
        ("/collective_rpc", call),
        ("/reset_prefix_cache", {}),
    ]


def test_servers_that_take_no_new_weights(server: Recorder, tmp_path: Any) -> None:
    client = VllmClient(server.url, "m")
    server.device = "cpu"
    with pytest.raises(WorkError, match=r"would not pack its experts anew.* --reloadable"):
        client.reload(tmp_path)
    server.development = False
    with pytest.raises(WorkError, match=r"takes no new weights.* --reloadable"):
        client.reload(tmp_path)
    assert server.requests == []


@pytest.mark.parametrize(
    ("prompt", "timed", "named"),
    [
        (400, False, "answered 400: maximum context length is 512"),
        (400, True, "answered 400: maximum context length is 512"),
        (500, True, "failed: .*engine died"),
        (600, False, "another form"),
    ],
)
def test_failures(server: Recorder, prompt: int, timed: bool, named: str) -> None:
    client = VllmClient(server.url, "m")
    with pytest.raises(WorkError, match=named):
        client.complete([[1], [prompt]], Sampling(max_tokens=2), timed=timed)


def test_a_server_that_is_not_there() -> None:
    client = VllmClient("http://127.0.0.1:1", "m")
    assert not client.is_up()
    with pytest.raises(WorkError, match="does not answer"):
        client.complete([[1]], Sampling(max_tokens=2))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a:port"])
def test_no_address(url: str) -> None:
    with pytest.raises(InputError, match="no address"):
        VllmClient(url, "m")


@pytest.mark.parametrize(
    "values", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}]
)
def test_no_sampling(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        Sampling(**{"max_tokens": 1, **values})
