"""Apptainer: a sandbox for machines that forbid user namespaces and have a setuid Apptainer.

A program sees a read-only image with its Python, and /tmp in memory. It has no network, no home, no
capability, no other process, and a process namespace of its own. Its user is the caller's (`nobody`
where the caller is root), who has no other name inside. `confine_script` takes the rest away before
the program begins: limits, and the system calls of `seccomp`.

Read in Apptainer's sources (commit and file at each place below), and never run against it: no
Apptainer was at hand. That is why `sandbox.find_sandbox` measures what a container really holds,
and refuses one that is no sandbox: a site's apptainer.conf may switch off what a flag asks for.
Singularity has the same flags.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mellum2_megatron.common.errors import InputError, first_line, shown
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

IMAGE_VARIABLE = "MELLUM2_SANDBOX_IMAGE"
"""Environment variable with the path of the image: a SIF file, or a folder with a root's files."""

_PROGRAMS = ("apptainer", "singularity")
_SCRIPT = Path(__file__).with_name("confine_script.py")
_FIX = "build one with a python3 (scripts/containers/mellum2.def has it) and name its path"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SPARE_THREADS = 4096
"""Threads that the user's other processes may begin while a program runs."""


@dataclass(frozen=True, slots=True)
class Apptainer:
    """A `Sandbox` of Apptainer or Singularity.

    Attributes:
        program: path of ``apptainer`` or ``singularity``.
        image: path of the image.
    """

    program: str
    image: Path
    _filter: bytes = field(repr=False)

    @staticmethod
    def is_installed() -> bool:
        """Return true if one of the programs is in PATH."""
        return any(map(shutil.which, _PROGRAMS))

    @classmethod
    def find(cls) -> Apptainer:
        """Return the sandbox of this machine, not tried yet.

        Raises:
            InputError: Apptainer is missing, or its image is not named or not there.
        """
        program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
        if program is None:
            raise InputError(
                "apptainer is not installed",
                rule="neither it nor singularity is in PATH",
                fix="ask the administrator for a setuid installation",
            )
        name = os.environ.get(IMAGE_VARIABLE, "")
        if not name:
            raise InputError(
                f"{IMAGE_VARIABLE} is not set",
                rule="Apptainer runs programs in an image, which this variable names",
                fix=_FIX,
            )
        image = Path(name)
        if not image.is_absolute() or not os.access(image, os.R_OK):
            raise InputError(
                f"{IMAGE_VARIABLE}={shown(name)}",
                rule="it must be the absolute path of a file or folder that can be read",
                fix=_FIX,
            )
        if image.resolve() == Path("/"):
            raise InputError(
                f"{IMAGE_VARIABLE}=/", rule="a program would see all of this machine", fix=_FIX
            )
        # In a bind, both are separators.
        if set(":,") & set(tempfile.gettempdir()):
            raise InputError(
                f"TMPDIR={shown(tempfile.gettempdir())}",
                rule="Apptainer takes no folder with a colon or comma",
                fix="set TMPDIR to another folder",
            )
        return cls(program, image, syscall_filter(platform.machine()))

    @property
    def description(self) -> str:
        return f"{Path(self.program).name} with {self.image}"

    def run(self, program: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        limits = limits or Limits()
        mark = secrets.token_bytes(16)
        try:
            with (
                tempfile.TemporaryDirectory(prefix="mellum2-program-") as folder,
                memory_file(stdin) as given,
            ):
                file = Path(folder, Path(PROGRAM).name)
                file.write_bytes(program.encode("utf-8", "replace"))
                file.chmod(0o444)
                if os.geteuid() == 0:
                    Path(folder).chmod(0o755)
                process = start_process(
                    [*self.command(folder), *_inner(limits, self._filter, mark)],
                    stdin=given,
                    env=_environment(self.program),
                )
                # It ends as the program did, and with 128 + N after a signal N; killed itself,
                # nobody knows (StartProcess in internal/pkg/runtime/engine/apptainer/
                # process_linux.go; wait_child in cmd/starter/c/starter.c).
                return Watch(
                    process, limits, lambda code: code if code >= 0 else None, mark=mark
                ).watch()
        except OSError as error:
            raise not_started(first_line(error)) from error

    def command(self, folder: str) -> list[str]:
        """Return the command up to the image; ``folder`` has the program.

        The flags are those of cmd/internal/cli/action_flags.go (00e9b038). Two are left out on
        purpose: ``--userns``, which such a machine forbids, and ``--disable-cache``, which removes
        the image where it is unpacked (execStarter in actions_linux.go, 041f3b82).
        """
        return [
            *(self.program, "--quiet", "exec"),
            # Namespaces of files, processes and memory; /tmp and /dev of its own; no variables.
            *("--containall", "--no-home", "--no-mount", "sys,devpts,hostfs,home,cwd"),
            # `none` is the only network that needs no permission of the administrator.
            *("--net", "--network", "none", "--uts", "--hostname", "sandbox"),
            *("--no-privs", "--drop-caps", "all"),
            *("--bind", f"{folder}:{Path(PROGRAM).parent}:ro"),
            str(self.image),
        ]


def _inner(limits: Limits, filter_: bytes, mark: bytes) -> list[str]:
    """Return the command inside: `confine_script` and what it is to do."""
    job = {
        "limits": {
            "CPU": limits.cpu_seconds,
            "AS": limits.memory_bytes,
            "FSIZE": limits.file_bytes,
            "NOFILE": OPEN_FILES,
            "CORE": CORE_BYTES,
            "SIGPENDING": PENDING_SIGNALS,
            "MSGQUEUE": 0,
            # Without a user namespace the kernel counts all threads of the user, so this one only
            # keeps a program from taking the machine before the watch sees it.
            "NPROC": _threads_of_user() + limits.processes + _SPARE_THREADS,
        },
        "filter": filter_.hex(),
        "mark": mark.hex(),
        "program": PROGRAM,
        "environment": ENVIRONMENT,
    }
    script = _SCRIPT.read_text(encoding="utf-8")
    return ["python3", "-I", "-S", "-B", "-c", script, json.dumps(job)]


def _environment(program: str) -> Mapping[str, str]:
    """Return Apptainer's own variables.

    None of the caller's: each flag has a variable too, so APPTAINER_BIND would show a program the
    caller's disks. Devices of GPUs are left out where apptainer.conf says "always use nv".
    """
    prefix = Path(program).name.upper()
    return {"PATH": _PATH, f"{prefix}_NO_NV": "1", f"{prefix}_NO_ROCM": "1"}


def _threads_of_user() -> int:
    """Return the number of threads that the user of programs has on this machine."""
    user = os.geteuid() or NOBODY
    threads = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            folder = os.stat(f"/proc/{name}/task")
        except OSError:
            continue
        threads += (folder.st_nlink - 2) * (folder.st_uid == user)
    return threads
