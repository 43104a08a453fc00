"""Processes for checks that may take forever or fall over: LaTeX, patterns, functions of a user.

They stay for many jobs, because importing what they need takes seconds. A process that passes a
limit is killed, and the next job starts another one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.json_files import JsonError, parse_object
from mellum2_megatron.common.limited_process import LimitError

SECONDS = 20.0
"""Wall time of a job, without the import of what its kind needs."""

_START_S = 120.0  # a process's start, and an import: a login node may be busy
_GONE_S = 10.0  # from a process's last word to its end
_MEMORY = 4 << 30
_LARGEST = 1 << 20
_SCRIPT = Path(__file__).with_name("worker_script.py")

_idle: list[_Worker] = []
_lock = threading.Lock()


class LeftError(LimitError):
    """A process that ended itself, or closed its channel: no limit and no signal did."""


class KilledError(LimitError):
    """A process that was killed from outside, perhaps for what another one took."""


def ask(job: Mapping[str, Any], *, seconds: float = SECONDS) -> dict[str, Any]:
    """Return the answer of a worker; any number of threads may ask at once.

    A job whose process is killed is given to a second one.

    Args:
        job: see `worker_script`.
        seconds: its time.

    Raises:
        LeftError: the process ended itself.
        LimitError: it passed the time or 4 GiB, or a signal ended it.
        WorkError: no process starts.
    """
    try:
        return _ask(job, seconds)
    except KilledError:
        return _ask(job, seconds)


def _ask(job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    worker = _take_idle() or _Worker()
    try:
        answer = worker.ask(job, seconds)
        if "limit" in answer:
            raise LimitError(str(answer["limit"]))
    except BaseException:
        worker.close()
        raise
    with _lock:
        _idle.append(worker)
    return answer


def _take_idle() -> _Worker | None:
    """Return a worker that waits; one that was killed while it waited is no fault of the job."""
    while True:
        with _lock:
            worker = _idle.pop() if _idle else None
        if worker is None or worker.is_alive():
            return worker
        worker.close()


class _Worker:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # to end it with all that a function has started
        )
        if sys.platform == "linux":  # only there another process can be limited
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(self._process.pid, resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        self._imported: set[str] = set()
        try:
            self._begin(lambda: self._read(_START_S))
        except BaseException:
            self.close()
            raise

    def ask(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        kind = job["kind"]
        if kind not in self._imported:
            self._begin(lambda: self._send({"kind": "import", "for": kind}, _START_S))
            self._imported.add(kind)
        return self._send(job, seconds)

    @staticmethod
    def _begin(step: Callable[[], object]) -> None:
        """Take a step before the job; that it fails says nothing of the job."""
        try:
            step()
        except KilledError:
            raise
        except LimitError as limit:
            raise WorkError(
                f"a process that judges answers did not start: {limit}",
                fix="look at the machine's load and memory",
            ) from None

    def _send(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode("ascii") + b"\n")
        except BrokenPipeError:
            raise self._end() from None
        return self._read(seconds)

    def _read(self, seconds: float) -> dict[str, Any]:
        """Return the next line's object."""
        assert self._process.stdout is not None
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise LimitError(f"it takes longer than {seconds:g} s")
            content = self._process.stdout.read(1 << 16)
            line += content or b""
            if not content:
                raise self._end()
            if len(line) > _LARGEST:
                raise LimitError(f"its answer is longer than {_LARGEST >> 20} MiB")
        try:
            return parse_object(line)
        except JsonError as error:
            raise LimitError(f"it gives no answer ({error})") from None

    def _end(self) -> LimitError:
        """Return the error of a process that says nothing any more."""
        try:
            code = self._process.wait(_GONE_S)
        except subprocess.TimeoutExpired:
            return LeftError("its process closes the files that it has not opened")
        if code >= 0:
            return LeftError(f"its process ends with exit code {code}")
        if code == -signal.SIGKILL:
            return KilledError("its process was killed: too much memory, or by somebody")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return LimitError(f"its process was ended by {name}: too much memory, or a fault")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


@atexit.register
def _close_all() -> None:
    while _idle:
        _idle.pop().close()
