"""bubblewrap: a sandbox in a user namespace, which needs no privilege and no image.

A program sees a read-only /usr, a Python, and an empty /tmp in memory. It has no network, no home,
no capability, no other process, and user and process namespaces of its own. Its user on the machine
is the caller's, or `nobody` where the caller is root: root is exempt from the limit of processes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.json_files import JsonError, parse_object
from mellum2_megatron.rlvr.rewards.seccomp import syscall_filter
from mellum2_megatron.rlvr.rewards.watch import (
    CORE_BYTES,
    ENVIRONMENT,
    NOBODY,
    OPEN_FILES,
    PENDING_SIGNALS,
    PROGRAM,
    Limits,
    Outcome,
    Watch,
    memory_file,
    not_started,
    start_process,
)

LIBRARY_VARIABLE = "LD_LIBRARY_PATH"
_PYTHON_PREFIX = "/opt/python"


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """A `Sandbox` of bubblewrap.

    Attributes:
        bwrap: path of bubblewrap.
        python: prefix of the Python that runs the programs; None for /usr/bin/python3.
    """

    bwrap: str
    python: Path | None
    _filter: bytes = field(repr=False)

    @classmethod
    def find(cls) -> Bubblewrap:
        """Return the sandbox of this machine, not tried yet.

        Raises:
            InputError: bubblewrap or prlimit is missing.
        """
        for program, package in (("bwrap", "bubblewrap"), ("prlimit", "util-linux")):
            if shutil.which(program) is None:
                raise InputError(
                    f"{program} is not installed",
                    rule="programs of a model run in a sandbox only, never by themselves",
                    fix=f"scripts/setup_sandbox.sh, or install the package {package}",
                )
        bwrap = shutil.which("bwrap")
        assert bwrap is not None
        return cls(bwrap, _visible_python(), syscall_filter(platform.machine()))

    @property
    def description(self) -> str:
        return "bubblewrap"

    def run(self, program: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        limits = limits or Limits()
        status, status_end = os.pipe()
        os.set_blocking(status, False)
        try:
            with (
                memory_file(program.encode("utf-8", "replace")) as source,
                memory_file(self._filter) as syscalls,
                memory_file(stdin) as given,
            ):
                process = start_process(
                    self._command(limits, source=source, syscalls=syscalls, status=status_end),
                    stdin=given,
                    pass_fds=(source, syscalls, status_end),
                    env={},
                )
            # bubblewrap reports an exit code only of a program that it could start.
            return Watch(process, limits, lambda _: _reported(status, "exit-code")).watch()
        except OSError as error:
            raise not_started(first_line(error)) from error
        finally:
            os.close(status)
            os.close(status_end)

    def _command(self, limits: Limits, *, source: int, syscalls: int, status: int) -> list[str]:
        """Return the command; the numbers are those of open files."""
        nobody, disk = str(NOBODY), str(limits.disk_bytes)
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
            *("--perms", "0444", "--ro-bind-data", str(source), PROGRAM),
            *("--proc", "/proc", "--dev", "/dev"),
            # The namespace's first process is bubblewrap, which has no limits and no filter.
            *("--ro-bind", "/dev/null", "/proc/1/mem"),
            *("--ro-bind", "/dev/null", "/proc/1/task/1/mem"),
            # bubblewrap's /dev and / are in memory, writable and without a limit.
            *("--tmpfs", "/dev/shm", "--remount-ro", "/dev/shm", "--remount-ro", "/dev"),
            *("--size", disk, "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"),
            "--clearenv",
        ]
        for name, value in ENVIRONMENT.items():
            words += ["--setenv", name, value]
        if self.python is not None:
            # A Python with a shared library of its own knows that by another path.
            words += ["--setenv", LIBRARY_VARIABLE, f"{_PYTHON_PREFIX}/lib"]
        return [
            *words,
            "--",
            "/usr/bin/prlimit",
            f"--cpu={limits.cpu_seconds}",
            f"--as={limits.memory_bytes}",
            f"--nproc={limits.processes}",
            f"--fsize={limits.file_bytes}",
            f"--nofile={OPEN_FILES}",
            f"--sigpending={PENDING_SIGNALS}",
            f"--core={CORE_BYTES}",
            "/usr/bin/python3"
            if self.python is None
            else f"{_PYTHON_PREFIX}/bin/python3.{sys.version_info.minor}",
            *("-s", "-B", PROGRAM),
        ]


def _reported(status: int, key: str) -> int | None:
    """Return a number that bubblewrap has reported."""
    report = bytearray()
    with contextlib.suppress(BlockingIOError):
        while content := os.read(status, 4096):
            report += content
    for line in report.decode("ascii", "replace").splitlines():
        with contextlib.suppress(JsonError):
            if isinstance(value := parse_object(line).get(key), int):
                return value
    return None


def _visible_python() -> Path | None:
    """Return the prefix of this Python if the sandbox's user can read it, else None."""
    prefix = Path(sys.base_prefix)
    if os.geteuid() != 0:
        return prefix
    readable = all(folder.stat().st_mode & 0o005 == 0o005 for folder in (prefix, *prefix.parents))
    return prefix if readable else None
