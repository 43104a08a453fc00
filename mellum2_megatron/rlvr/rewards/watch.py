"""The watch over a program in a sandbox, whichever keeps it in: its limits, its end, its outcome.

The kernel limits processor time, address space and size of a file of each process. This process
watches the rest: wall time, output, and every 50 ms memory, number of processes, number and size of
files of all processes together. In a Slurm job its cgroup bounds what a program could do in
between.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.field_checks import check_fields, require_positive

Stopped = Literal["time", "memory", "processes", "files", "disk", "output"]
"""The limit that ended a program from outside."""

NOBODY = 65534
"""User and group of programs where the caller is root, who is exempt from limits."""
PROGRAM = "/program/main.py"
"""Place of a program in its sandbox."""
OPEN_FILES = 256
"""Open files of a process."""
PENDING_SIGNALS = 256
"""Signals that wait and timers of a program; the kernel counts them for its user's others too."""
CORE_BYTES = 1
"""Size of a core file. Of 0 the kernel still starts the machine's own program for crashes, which
reads all of the memory; 1 is its word for no such program either (do_coredump, fs/coredump.c)."""
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a set is part of what a program prints
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
}
"""All variables of a program."""

START_S = 60.0
"""Seconds in which a program must have started: an image may lie on a slow disk."""
_POLL_S = 0.05
_LARGEST_MESSAGE = 4096
_GONE_S = 120.0
"""Seconds in which the kernel ends a killed namespace. A fork bomb in Apptainer has thousands of
processes, whose end took more than 10 s beside six busy loops on two cores."""
_WRITABLE = ("tmp", "dev/shm")
"""Places that a program may write to, in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one program.

    Attributes:
        seconds: wall time, default 10.
        cpu_seconds: processor time of each process, whole seconds, default 10.
        memory_bytes: address space of each process, and memory of all together; default 512 MiB.
        processes: processes and threads, default 32.
        file_bytes: size of a file, default 16 MiB.
        disk_bytes: size of all files together, default 64 MiB.
        files: number of files, default 4,096; open ones in a process: 256.
        output_bytes: bytes of standard output, default 1 MiB.

    Raises:
        InputError: a limit that is not above 0.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 512 << 20
    processes: int = 32
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    files: int = 4096
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        check_fields("limits", self)
        for name in self.__slots__:
            require_positive(f"limits.{name}", getattr(self, name), most=1 << 40)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a program did.

    Attributes:
        output: standard output, at most ``output_bytes``.
        exit_code: exit code, 128 + N for signal N; None if it was stopped.
        stopped: the limit that stopped it from outside; default None.
        message: beginning and end of its standard error, for people.
    """

    output: bytes
    exit_code: int | None
    stopped: Stopped | None = None
    message: str = ""

    @property
    def reason(self) -> str:
        """Why it did not end well, in a few words; empty if it did."""
        if self.stopped is not None:
            return f"limit of {self.stopped}"
        if not self.exit_code:
            return ""
        if self.exit_code > 128:
            number = self.exit_code - 128
            with contextlib.suppress(ValueError):
                return f"ended by {signal.Signals(number).name}"
        last = self.message.strip().rpartition("\n")[2]
        return f"exit code {self.exit_code}" + (f" ({last[:200]})" if last else "")


class Sandbox(Protocol):
    """A place for programs; `sandbox.find_sandbox` returns the one of this machine."""

    @property
    def description(self) -> str:
        """What keeps the programs in, for a log."""

    def run(self, program: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """Run a Python program to its end or a limit; every process of it is dead afterwards.

        Args:
            program: the source.
            stdin: its standard input.
            limits: its limits, default `Limits()`.

        Raises:
            WorkError: the sandbox itself did not start, or its processes could not be ended.
        """


def start_process(
    command: Sequence[str], *, stdin: int, pass_fds: Sequence[int] = (), env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start the process of a sandbox in a session of its own, as `NOBODY` where the caller is root.

    Raises:
        OSError: it cannot be started.
    """
    is_root = os.geteuid() == 0
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=pass_fds,
        start_new_session=True,
        env=env,
        cwd="/",
        user=NOBODY if is_root else None,
        group=NOBODY if is_root else None,
        extra_groups=[] if is_root else None,
    )


class Watch:
    """Reads what a sandbox says, and ends it at a limit.

    Args:
        process: the sandbox's own process, which keeps both pipes open until the last process of
            the program's namespace is dead.
        limits: limits of the program.
        exit_code: exit code of the program, from that of the process; None: it did not run.
        mark: what standard output begins with once the program runs, and the time of the program
            with it. Default none: it runs at once.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        limits: Limits,
        exit_code: Callable[[int], int | None],
        *,
        mark: bytes = b"",
    ) -> None:
        self._process, self._limits, self._exit_code = process, limits, exit_code
        self._mark, self._runs = mark, not mark
        self._outside = {_device(f"/{place}") for place in _WRITABLE}

    def watch(self) -> Outcome:
        """Wait for the end of the program, and return what it did."""
        process, limits = self._process, self._limits
        assert process.stdout is not None
        assert process.stderr is not None
        output, message = bytearray(), bytearray()
        stopped: Stopped | None = None
        deadline = time.monotonic() + (limits.seconds if self._runs else START_S)
        next_look = time.monotonic() + _POLL_S
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, output)
            selector.register(process.stderr, selectors.EVENT_READ, message)
            try:
                while selector.get_map() and stopped is None:
                    for key, _ in selector.select(_POLL_S):
                        content = os.read(key.fd, 1 << 16)
                        if not content:
                            selector.unregister(key.fileobj)
                        else:
                            key.data.extend(content)
                    # Of messages the beginning and the end are kept.
                    if len(message) > _LARGEST_MESSAGE:
                        del message[_LARGEST_MESSAGE // 2 : -_LARGEST_MESSAGE // 2]
                    if not self._runs and (place := output.find(self._mark)) >= 0:
                        del output[: place + len(self._mark)]
                        self._runs = True
                        deadline = time.monotonic() + limits.seconds
                    if len(output) > limits.output_bytes:
                        stopped = "output"
                    elif time.monotonic() > deadline:
                        stopped = "time"
                    elif self._runs and time.monotonic() > next_look:
                        stopped, next_look = self._look(), time.monotonic() + _POLL_S
            finally:
                self._end(selector)
        said = message.decode("utf-8", "replace")
        code = self._exit_code(process.returncode)
        if not self._runs or (code is None and stopped is None):
            # The last line: Python's tracebacks and Apptainer's messages end with the reason.
            why = said.strip().rpartition("\n")[2] or "it was killed"
            raise not_started(f"nothing for {START_S:g} s; {why}" if stopped == "time" else why)
        return Outcome(
            output=bytes(output[: limits.output_bytes]),
            exit_code=None if stopped else code,
            stopped=stopped,
            message=said,
        )

    def _look(self) -> Stopped | None:
        """Return the limit that all processes together have passed, if any."""
        limits = self._limits
        starters, programs = self._inside()
        memory = threads = 0
        for pid in programs:
            with contextlib.suppress(OSError, ValueError):
                memory += _memory_of(Path(f"/proc/{pid}/status").read_text())
                threads += os.stat(f"/proc/{pid}/task").st_nlink - 2
        if memory > limits.memory_bytes:
            return "memory"
        if threads > limits.processes:
            return "processes"
        # Empty files take memory of the kernel and no disk.
        files = used = 0
        for disk in self._disks((*starters, *programs)):
            files += disk.f_files - disk.f_ffree
            used += (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        if files > limits.files:
            return "files"
        return "disk" if used > limits.disk_bytes else None

    def _inside(self) -> tuple[list[int], list[int]]:
        """Return the processes in the namespace: its first, and those of the program."""
        first = _children([self._process.pid])
        programs: list[int] = []
        generation = first
        # Orphans are children of the first one.
        while len(programs) <= self._limits.processes and (generation := _children(generation)):
            programs += generation
        return first, programs

    def _disks(self, pids: Sequence[int]) -> Iterator[os.statvfs_result]:
        """Yield the disks in memory that a program can write to, each once."""
        seen = set(self._outside)
        for place in _WRITABLE:
            for pid in pids:
                path = f"/proc/{pid}/root/{place}"
                # Another user's, until the sandbox's first process has become its program.
                with contextlib.suppress(OSError):
                    # Until the sandbox has changed the root, these are the machine's own.
                    if (device := _device(path)) not in seen:
                        seen.add(device)
                        yield os.statvfs(path)
                        break

    def _end(self, selector: selectors.BaseSelector) -> None:
        """Kill the group and with it the namespace, and wait until every process is gone."""
        # The first process of a namespace is dead when all others in it are.
        waiting = []
        for pid in _children([self._process.pid]):
            with contextlib.suppress(OSError):
                waiting.append(os.pidfd_open(pid))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for number in waiting:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(number, signal.SIGKILL)
            selector.register(number, selectors.EVENT_READ)
        deadline = time.monotonic() + _GONE_S
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(_POLL_S):
                if key.fd in waiting or not os.read(key.fd, 1 << 16):
                    selector.unregister(key.fileobj)
        gone = not selector.get_map()
        self._process.wait()
        for number in waiting:
            os.close(number)
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        if not gone:
            raise WorkError(
                f"processes of a sandbox live {_GONE_S:.0f} s after they were killed",
                fix="look for processes of the user nobody, or of your own, that wait for a disk",
            )


def not_started(why: str) -> WorkError:
    """Return the error of a sandbox that did not come to run its program."""
    return WorkError(
        f"the sandbox did not start: {why}",
        fix="look at the machine's memory and number of processes",
    )


def _memory_of(status: str) -> int:
    """Return the bytes of a process, from its /proc/PID/status: what is swapped out counts too."""
    lines = (line.split() for line in status.splitlines())
    kinds = ("VmRSS:", "VmSwap:", "HugetlbPages:")
    return sum(int(words[1]) << 10 for words in lines if words and words[0] in kinds)


def _children(pids: Sequence[int]) -> list[int]:
    """Return the children of processes, as far as they still live."""
    found: list[int] = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                children = Path(f"/proc/{pid}/task/{task}/children").read_text()
                found += map(int, children.split())
    return found


def _device(path: str) -> int:
    """Return the number of the disk that a folder lies on; -1 for none."""
    try:
        return os.stat(path).st_dev
    except FileNotFoundError:
        return -1


@contextlib.contextmanager
def memory_file(content: bytes) -> Iterator[int]:
    """Yield a file in memory that nobody can write to or enlarge any more."""
    number = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(number), "wb") as file:
            file.write(content)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
        os.lseek(number, 0, os.SEEK_SET)
        yield number
    finally:
        os.close(number)
