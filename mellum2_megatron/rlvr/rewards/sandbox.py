"""Programs of a model, run where they can do no harm: bubblewrap, with limits of every kind.

A program sees a read-only /usr, a Python, and an empty /tmp in memory. It has no network, no home,
no capability, no other process, and user and process namespaces of its own. Its user on the machine
is the caller's, or `nobody` where the caller is root: root is exempt from the limit of processes.
What it says is only its output; verdicts are made outside.

Limits of the kernel: processor time, address space and size of a file for each process; number of
processes and threads; size of /tmp. This process watches the rest: wall time, output, memory of all
processes together and number of files, the last two every 50 ms. In a Slurm job its cgroup bounds
what a program could do in between.

Where user namespaces are forbidden there is no sandbox, and programs are refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mellum2_megatron.common.errors import InputError, WorkError, first_line
from mellum2_megatron.common.field_checks import check_fields, require_positive
from mellum2_megatron.common.json_files import JsonError, parse_object
from mellum2_megatron.rlvr.rewards.seccomp import MACHINES, syscall_filter

Stopped = Literal["time", "memory", "files", "output"]
"""The limit that ended a program from outside."""

_NOBODY = 65534
_POLL_S = 0.05
_PYTHON_PREFIX = "/opt/python"
_PROGRAM = "/program/main.py"
_LARGEST_MESSAGE = 4096
_GONE_S = 10.0
"""Seconds in which the kernel ends a killed namespace, on a busy machine too."""


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
        message: beginning of its standard error, for people.
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


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A place for programs; make it with `find_sandbox`.

    Attributes:
        bwrap: path of bubblewrap.
        python: prefix of the Python that runs the programs; None for /usr/bin/python3.
    """

    bwrap: str
    python: Path | None
    _filter: bytes = field(repr=False)

    def run(self, program: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """Run a Python program to its end or a limit; every process of it is dead afterwards.

        Args:
            program: the source.
            stdin: its standard input.
            limits: its limits, default `Limits()`.

        Raises:
            WorkError: the sandbox itself did not start, or its processes could not be ended.
        """
        limits = limits or Limits()
        is_root = os.geteuid() == 0
        status, status_end = os.pipe()
        os.set_blocking(status, False)
        try:
            with (
                _memory_file(program.encode("utf-8", "replace")) as source,
                _memory_file(self._filter) as syscalls,
                _memory_file(stdin) as given,
            ):
                process = subprocess.Popen(
                    self._command(limits, source=source, syscalls=syscalls, status=status_end),
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(source, syscalls, status_end),
                    start_new_session=True,
                    env={},
                    user=_NOBODY if is_root else None,
                    group=_NOBODY if is_root else None,
                    extra_groups=[] if is_root else None,
                )
            return _Watch(process, status, limits).watch()
        except OSError as error:
            raise _not_started(first_line(error)) from error
        finally:
            os.close(status)
            os.close(status_end)

    def _command(self, limits: Limits, *, source: int, syscalls: int, status: int) -> list[str]:
        """Return the command; the numbers are those of open files."""
        nobody, disk = str(_NOBODY), str(limits.disk_bytes)
        words = [
            *(self.bwrap, "--unshare-all", "--unshare-user", "--disable-userns"),
            *("--uid", nobody, "--gid", nobody, "--hostname", "sandbox"),
            *("--die-with-parent", "--new-session", "--cap-drop", "ALL"),
            *("--seccomp", str(syscalls), "--json-status-fd", str(status)),
            *("--ro-bind", "/usr", "/usr"),
        ]
        for name in ("bin", "lib", "lib64"):
            place = Path("/", name)
            if place.is_symlink():
                words += ["--symlink", os.readlink(place), str(place)]
            elif place.is_dir():
                words += ["--ro-bind", str(place), str(place)]
        if self.python is not None:
            words += ["--ro-bind", str(self.python), _PYTHON_PREFIX]
        words += [
            *("--perms", "0444", "--ro-bind-data", str(source), _PROGRAM),
            *("--proc", "/proc", "--dev", "/dev"),
            # bubblewrap's /dev and / are in memory, writable and without a limit.
            *("--tmpfs", "/dev/shm", "--remount-ro", "/dev/shm", "--remount-ro", "/dev"),
            *("--size", disk, "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"),
            "--clearenv",
        ]
        for name, value in _ENVIRONMENT.items():
            words += ["--setenv", name, value]
        return [
            *words,
            "--",
            "/usr/bin/prlimit",
            f"--cpu={limits.cpu_seconds}",
            f"--as={limits.memory_bytes}",
            f"--nproc={limits.processes}",
            f"--fsize={limits.file_bytes}",
            "--nofile=256",
            "--core=0",
            "/usr/bin/python3"
            if self.python is None
            else f"{_PYTHON_PREFIX}/bin/python3.{sys.version_info.minor}",
            *("-s", "-B", _PROGRAM),
        ]


_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a set is part of what a program prints
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
}


@functools.cache
def find_sandbox() -> Sandbox:
    """Return this machine's sandbox, tried once.

    Raises:
        InputError: bubblewrap or prlimit is missing, the machine has no filter of system calls, or
            user namespaces are forbidden.
    """
    for program, package in (("bwrap", "bubblewrap"), ("prlimit", "util-linux")):
        if shutil.which(program) is None:
            raise InputError(
                f"{program} is not installed",
                rule="programs of a model run in a sandbox only, never by themselves",
                fix=f"scripts/setup_sandbox.sh, or install the package {package}",
            )
    if platform.machine() not in MACHINES:
        raise InputError(
            f"a machine of kind {platform.machine()}",
            rule=f"the sandbox knows the system calls of {' and '.join(MACHINES)}",
            fix="run the programs on one of those",
        )
    bwrap = shutil.which("bwrap")
    assert bwrap is not None
    sandbox = Sandbox(bwrap, _visible_python(), syscall_filter(platform.machine()))
    try:
        outcome = sandbox.run("print(6 * 7)", limits=Limits(seconds=60.0))
    except WorkError as error:
        raise InputError(
            error.what,
            rule="the sandbox needs user namespaces without privileges, which a machine or "
            "container may forbid; programs are never run without it",
            fix="allow them (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
            "kernel.apparmor_restrict_unprivileged_userns), or score on another machine",
        ) from error
    if outcome.output.strip() != b"42":
        raise InputError(
            f"the sandbox does not run Python: {outcome.reason or outcome.message[:200]}",
            rule="a first program must print its result",
            fix="install python3, which the sandbox runs as /usr/bin/python3",
        )
    return sandbox


def _visible_python() -> Path | None:
    """Return the prefix of this Python if the sandbox's user can read it, else None."""
    prefix = Path(sys.base_prefix)
    if os.geteuid() != 0:
        return prefix
    readable = all(folder.stat().st_mode & 0o005 == 0o005 for folder in (prefix, *prefix.parents))
    return prefix if readable else None


class _Watch:
    """Reads what a sandbox says, and ends it at a limit."""

    def __init__(self, process: subprocess.Popen[bytes], status: int, limits: Limits) -> None:
        self._process, self._status, self._limits = process, status, limits
        self._report = bytearray()

    def watch(self) -> Outcome:
        """Wait for the end of the program, and return what it did."""
        process, limits = self._process, self._limits
        assert process.stdout is not None
        assert process.stderr is not None
        output, message = bytearray(), bytearray()
        stopped: Stopped | None = None
        deadline = time.monotonic() + limits.seconds
        next_look = time.monotonic() + _POLL_S
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, output)
            selector.register(process.stderr, selectors.EVENT_READ, message)
            try:
                # bubblewrap holds both pipes open until the namespace's last process is dead.
                while selector.get_map() and stopped is None:
                    for key, _ in selector.select(_POLL_S):
                        content = os.read(key.fd, 1 << 16)
                        if not content:
                            selector.unregister(key.fileobj)
                        # Of messages only the beginning is kept, and the rest is read and dropped.
                        elif key.data is output or len(message) < _LARGEST_MESSAGE:
                            key.data.extend(content)
                    if len(output) > limits.output_bytes:
                        stopped = "output"
                    elif time.monotonic() > deadline:
                        stopped = "time"
                    elif time.monotonic() > next_look:
                        stopped, next_look = self._look(), time.monotonic() + _POLL_S
            finally:
                self._end(selector)
        return self._outcome(
            stopped, bytes(output[: limits.output_bytes]), message.decode("utf-8", "replace")
        )

    def _look(self) -> Stopped | None:
        """Return the limit that all processes together have passed, if any."""
        pages = 0
        for pid in _descendants(self._process.pid):
            with contextlib.suppress(OSError, ValueError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        if pages * os.sysconf("SC_PAGE_SIZE") > self._limits.memory_bytes:
            return "memory"
        child = self._status_of("child-pid")
        # Empty files take memory of the kernel and no disk.
        with contextlib.suppress(OSError):
            disk = os.statvfs(f"/proc/{child}/root/tmp")
            # Until bubblewrap has changed the root, this is the machine's own /tmp.
            is_ours = disk.f_blocks * disk.f_frsize <= self._limits.disk_bytes
            if is_ours and disk.f_files - disk.f_ffree > self._limits.files:
                return "files"
        return None

    def _status_of(self, key: str) -> int | None:
        """Return a number that bubblewrap has reported, None before."""
        with contextlib.suppress(BlockingIOError):
            while content := os.read(self._status, 4096):
                self._report += content
        for line in self._report.decode("ascii", "replace").splitlines():
            with contextlib.suppress(JsonError):
                if isinstance(value := parse_object(line).get(key), int):
                    return value
        return None

    def _end(self, selector: selectors.BaseSelector) -> None:
        """Kill the group and with it the namespace, and wait until every process is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        deadline = time.monotonic() + _GONE_S
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(_POLL_S):
                if not os.read(key.fd, 1 << 16):
                    selector.unregister(key.fileobj)
        gone = not selector.get_map()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        if not gone:
            raise WorkError(
                f"processes of a sandbox live {_GONE_S:.0f} s after they were killed",
                fix="look for processes of the user nobody, or of your own, that wait for a disk",
            )

    def _outcome(self, stopped: Stopped | None, output: bytes, message: str) -> Outcome:
        code = self._status_of("exit-code")
        # bubblewrap reports an exit code only of a program that it could start.
        if code is None and stopped is None:
            raise _not_started(message.strip() or "it was killed")
        return Outcome(
            output=output,
            exit_code=None if stopped else code,
            stopped=stopped,
            message=message[:_LARGEST_MESSAGE],
        )


def _not_started(why: str) -> WorkError:
    return WorkError(
        f"the sandbox did not start: {why}",
        fix="look at the machine's memory and number of processes",
    )


def _descendants(pid: int) -> list[int]:
    """Return a process and all that come from it, as far as they still live."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{task}/children").read_text()
                found += map(int, children.split())
    return found


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[int]:
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
