"""vLLM's server as a child process: started, waited for, and ended with all that it started."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.serving.client import VllmClient
from mellum2_megatron.serving.command import (
    ENVIRONMENT,
    check_versions,
    read_versions,
    reload_switches,
    serve_command,
)

HOST = "127.0.0.1"
_NAME = "mellum2"
_POLL_S = 0.25
_END_S = 20.0
"""Seconds that the server has to end by itself."""

_OWN = re.compile(
    r"(PYTHONPATH|RANK|WORLD_SIZE|MASTER_(ADDR|PORT)|(LOCAL|GROUP|ROLE)_\w+|TORCHELASTIC_\w+)$"
)
"""Variables of this process that vLLM's would take for their own: another Python's path, and a
training's ranks (torch.distributed.elastic)."""

_STARTER = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Starts the server so that the kernel ends it with this process (Linux: PR_SET_PDEATHSIG)."""


class VllmServer:
    """A server of a folder; a context manager.

    ::

        with VllmServer(python, folder, architecture, log=log, reloadable=True) as server:
            answers = server.client.complete(prompts, Sampling(max_tokens=64))
            server.hand_over(newer_folder)

    Args:
        python: interpreter of the engine's environment.
        folder: Hugging Face folder.
        architecture: the folder's.
        log: file for what the server prints.
        use_mtp: draft with the MTP head, default False.
        reloadable: let `hand_over` give new weights to the running server, default False: it starts
            again. Its development mode, which this needs, lets everyone who reaches the port do as
            they like; it listens at 127.0.0.1 alone.
        max_length: longest request and answer together; None (default): the model's context.
        dtype: vLLM's ``--dtype``, default the folder's.
        cache_gb: memory of the keys and values on a CPU, whole GB; default 1.
        eager_on_cpu: compile nothing on a CPU, which takes minutes; default False.
        start_s: seconds it may take to start, default 600.
        more: further words of vLLM's own, default none.

    Raises:
        InputError: the environment has no vLLM, or versions that cannot serve the model.
    """

    def __init__(
        self,
        python: Path,
        folder: Path,
        architecture: Mellum2Architecture,
        *,
        log: Path,
        use_mtp: bool = False,
        reloadable: bool = False,
        max_length: int | None = None,
        dtype: str = "auto",
        cache_gb: int = 1,
        eager_on_cpu: bool = False,
        start_s: float = 600.0,
        more: tuple[str, ...] = (),
    ) -> None:
        self.versions = read_versions(python)
        check_versions(self.versions, architecture, use_mtp=use_mtp)
        self._log, self._start_s = log, start_s
        self._reloadable = reloadable
        words, switches = reload_switches(self.versions) if reloadable else ([], {})
        port = free_port()
        self._serve = functools.partial(
            serve_command,
            python,
            architecture=architecture,
            name=_NAME,
            host=HOST,
            port=port,
            use_mtp=use_mtp,
            max_length=max_length,
            dtype=dtype,
        )
        if eager_on_cpu and self.versions.cpu:
            words.append("--enforce-eager")
        self._more = (*words, *more)
        self._command = [*self._serve(folder=folder), *self._more]
        self._environment = {
            **{name: value for name, value in os.environ.items() if not _OWN.match(name)},
            **ENVIRONMENT,
            "VLLM_CPU_KVCACHE_SPACE": str(cache_gb),
            "VLLM_SERVER_DEV_MODE": "0",
            **switches,
        }
        self.client = VllmClient(f"http://{HOST}:{port}", _NAME)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the server; see `start`."""
        self.start()
        return self

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            WorkError: it ends or takes too long; the message has its reason.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _STARTER, str(os.getpid()), *self._command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its engine is a process of its own: one group for both
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """End the server."""
        self.stop()

    def stop(self) -> None:
        """End the server and its engine; nothing is left when this returns."""
        process, self._process = self._process, None
        if process is None:
            return
        for number, seconds in ((signal.SIGTERM, _END_S), (signal.SIGKILL, _END_S)):
            # Processes of the group may outlive the one that was started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        process.wait()

    def hand_over(self, folder: Path) -> None:
        """Give the server another folder of the same architecture; send no requests meanwhile.

        A server that is ``reloadable`` takes its weights while it runs, others start again.

        Args:
            folder: Hugging Face folder.

        Raises:
            WorkError: it could not load them, or does not start again.
        """
        self._command = [*self._serve(folder=folder), *self._more]
        if self._reloadable:
            self.client.reload(folder)
            return
        self.stop()
        self.start()

    def peak_memory(self) -> int | None:
        """Return the largest resident memory of its processes in bytes, their sum; None if over.

        The peaks may have come at different times.
        """
        if self._process is None:
            return None
        total = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                if os.getpgid(int(status.parent.name)) == self._process.pid:
                    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
                    total += int(found[1]) * 1024 if found else 0
        return total

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + self._start_s
        while not self.client.is_up():
            code = self._process.poll()
            if code is not None:
                raise WorkError(
                    f"vLLM ended with {code} before it answered: {reason(self._log)}",
                    fix=f"see {self._log}",
                )
            if time.monotonic() > end:
                raise WorkError(
                    f"vLLM did not answer within {self._start_s:g} seconds", fix=f"see {self._log}"
                )
            time.sleep(_POLL_S)


def reason(log: Path) -> str:
    """Return the first error that a log of vLLM names, which is the cause of those after it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        found = re.search(r"(?:^|\] |\s)((?:\w+\.)*\w*(?:Error|Exception): .+)$", line)
        if found:
            return found[1][:300]
    return lines[-1][:300] if lines else "it printed nothing"


def free_port() -> int:
    """Return a port of this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
