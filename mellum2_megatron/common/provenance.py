"""Provenance of a run: commit of the code, and packages, machine and job of each start.

Each start of a run appends one line to ``DIR/provenance.jsonl``, and each orderly end another::

    {"event": "start", "time": "2026-05-04T10:11:12+00:00",
     "code": {"origin": "git", "commit": "0f3c...", "dirty": false, "version": "0.1.0"},
     "python": "3.12.3", "packages": {"torch": "2.15.0", ...}, "host": "node-1", "hosts": 32,
     "world_size": 256, "from_step": 12000, "slurm": {"SLURM_JOB_ID": "4711"}}

The line of an end has the ``outcome``, and the ``load`` of the first rank's machine since the start
(`mellum2_megatron.common.machine_load`).

A copy of the code without its Git repository (a packager's archive) has `SNAPSHOT_FILE` at its
root. Without a repository and without that file the commit is recorded as unknown.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import mellum2_megatron
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import read_bytes, write_json
from mellum2_megatron.common.json_files import load_json, parse_object
from mellum2_megatron.common.secret_names import is_secret_name, mask_secrets
from mellum2_megatron.common.values import from_plain

SNAPSHOT_FILE = "PROVENANCE.json"
"""File at the root of a copy of the code without Git repository; see `write_snapshot`."""

RECORDS_FILE = "provenance.jsonl"
"""File in a run's folder; see `record`."""

PROJECT = "mellum2-megatron"
"""Name of this project's distribution."""

PACKAGES = (
    "torch",
    "megatron-core",
    "emerging-optimizers",
    "transformer-engine",
    "transformers",
    "nemo-run",
)
"""Distributions whose versions are recorded, if installed."""

SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
)

_GIT_SECONDS = 30
"""Time limit of one call of Git, which can hang on a network disk."""

_HEX_DIGITS = frozenset("0123456789abcdef")

Origin = Literal["git", "snapshot", "package", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Origin of the running code.

    Attributes:
        origin: ``git``: a checkout. ``snapshot``: a copy of one, with `SNAPSHOT_FILE`. ``package``:
            an installed package. ``unknown``: a checkout that Git cannot read (``reason``).
        version: version of the package.
        commit: full hash; None (default): unknown.
        dirty: true with uncommitted changes, which include files that Git neither tracks nor
            ignores; None (default): unknown.
        reason: reason for an unknown commit; None (default) if the commit is known.
    """

    origin: Origin
    version: str
    commit: str | None = None
    dirty: bool | None = None
    reason: str | None = None

    def __str__(self) -> str:
        """Return one phrase: ``commit 0f3c... with uncommitted changes``."""
        if self.commit is None:
            return f"commit not known ({self.reason})"
        changes = {
            True: " with uncommitted changes",
            False: "",
            None: ", not known whether unchanged",
        }[self.dirty]
        return f"commit {self.commit}{changes}"


def project_root() -> Path:
    """Return the parent folder of the running package: checkout, snapshot or ``site-packages``."""
    return Path(str(mellum2_megatron.__file__)).resolve().parent.parent


def source_code(root: Path | None = None) -> Code:
    """Return the origin of the code in ``root``.

    Git counts only if it tracks the package's files. A package installed into ``.venv`` inside a
    checkout is therefore not recorded as that checkout.

    Args:
        root: folder that holds the package; None: the running package's.

    Raises:
        InputError: `SNAPSHOT_FILE` exists but is damaged.
    """
    root = root or project_root()
    version = _version(PROJECT) or "unknown"
    snapshot = root / SNAPSHOT_FILE
    # A checkout's own repository comes before the file, which may be left over from packaging.
    if (root / ".git").exists() or not snapshot.is_file():
        code = _from_git(root, version)
        if code is not None:
            return code
    if snapshot.is_file():
        return _from_snapshot(snapshot)
    return Code(
        origin="package",
        version=version,
        reason="installed as a package, not run from a Git checkout",
    )


def write_snapshot(folder: Path, code: Code | None = None) -> Path:
    """Write `SNAPSHOT_FILE` into a copy of the code that has no Git repository; return its path.

    Args:
        folder: root of the copy; the package's folder lies in it.
        code: origin of the copied code; None (default): that of the running code.
    """
    path = folder / SNAPSHOT_FILE
    write_json(path, asdict(code or source_code()) | {"time": _now()})
    return path


def record(
    output: Path,
    *,
    event: Literal["launch", "start", "end"],
    world_size: int | None = None,
    from_step: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Append one line to the run's `RECORDS_FILE` and return its content.

    Args:
        output: folder of the run.
        event: ``start`` of the ranks, ``launch`` of a job, whose ranks may run other code, or
            ``end`` of the ranks with an ``outcome``: ``finished``, ``stopped`` or ``failed``.
        world_size: number of ranks; None (default): unknown.
        from_step: step of the checkpoint that this start resumes; None (default) for a new run.
        more: further keys of the line, default none.
    """
    # torchrun counts its agents, one for each machine; Slurm counts nodes before torchrun runs.
    hosts = os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES")
    line: dict[str, Any] = {
        "event": event,
        **software(),
        "host": socket.gethostname(),
        "hosts": int(hosts) if hosts else None,
        "world_size": world_size,
        "from_step": from_step,
        "slurm": {name: os.environ[name] for name in SLURM_VARIABLES if name in os.environ},
        **(more or {}),
    }
    # Git's reasons and a caller's overrides may hold an address with a password.
    line = _masked(line)
    _append(output / RECORDS_FILE, json.dumps(line, ensure_ascii=False))
    return line


def software() -> dict[str, Any]:
    """Return the time, the code's origin, and the versions of Python and of `PACKAGES`."""
    return {
        "time": _now(),
        "code": asdict(source_code()),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _masked(value: Any) -> Any:
    """Return a value of JSON with every text in it masked, and all under a secret name."""
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, (list, tuple)):
        return [_masked(item) for item in value]
    if isinstance(value, Mapping):
        return {
            name: "***" if name.isupper() and is_secret_name(name) else _masked(item)
            for name, item in value.items()
        }
    return value


def read_records(output: Path) -> list[dict[str, Any]]:
    """Return the lines that `record` wrote, oldest first, without damaged ones; empty if none."""
    path = output / RECORDS_FILE
    if not path.is_file():
        return []
    records = []
    for text in read_bytes(path).decode("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # half a line, left by a crash
            records.append(parse_object(text))
    return records


def recorded_code(output: Path) -> tuple[Code, ...]:
    """Return the distinct states of the code that started a run, in order."""
    codes: list[Code] = []
    for line in read_records(output):
        if line.get("event") != "start":
            continue
        try:
            code = _code(line["code"], str(output / RECORDS_FILE))
        except (KeyError, InputError):
            continue  # a damaged line must not block the release of a finished run
        if code not in codes:
            codes.append(code)
    return tuple(codes)


def _from_git(root: Path, version: str) -> Code | None:
    """Return the code with the commit that Git reports; None if Git does not track the package."""
    is_checkout = (root / ".git").exists()
    file = root / mellum2_megatron.__name__ / "__init__.py"
    try:
        tracked = _git(root, "ls-files", "--error-unmatch", str(file))
        if tracked.returncode:
            # Git refuses a checkout that belongs to another user (safe.directory).
            if is_checkout and "dubious ownership" in tracked.stderr:
                return _unknown(version, f"Git refuses: {tracked.stderr.strip().splitlines()[0]}")
            return None
        commit = _git(root, "rev-parse", "HEAD")
        status = _git(root, "status", "--porcelain", "--", str(root))
    except FileNotFoundError:
        return _unknown(version, "git is not installed here") if is_checkout else None
    except subprocess.TimeoutExpired:
        return _unknown(version, f"git did not answer in {_GIT_SECONDS} seconds")
    if commit.returncode or status.returncode:
        return _unknown(version, (commit.stderr + status.stderr).strip() or "git failed")
    return Code(
        origin="git",
        version=version,
        commit=commit.stdout.strip(),
        dirty=bool(status.stdout.strip()),
    )


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Inside a Git hook GIT_DIR names another repository. `_from_git` matches an English message.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["LC_ALL"] = "C"
    return subprocess.run(
        ["git", "-C", str(root), "--no-optional-locks", *words],
        capture_output=True,
        text=True,
        timeout=_GIT_SECONDS,
        check=False,
        env=environment,
    )


def _unknown(version: str, reason: str) -> Code:
    return Code(origin="unknown", version=version, reason=reason)


def _from_snapshot(path: Path) -> Code:
    try:
        value = load_json(path)
        code = _code(value, str(path))
    except (OSError, ValueError) as error:
        raise InputError(
            str(path), rule=f"must be JSON ({error})", fix="package the code again"
        ) from None
    return replace(code, origin="snapshot") if code.commit is not None else code


def _code(value: Any, where: str) -> Code:
    """Read a `Code` out of JSON, ignoring keys of other versions of this project.

    Raises:
        InputError: not a `Code`.
    """
    try:
        commit, dirty, origin = value.get("commit"), value.get("dirty"), value["origin"]
        if commit is not None and not (
            isinstance(commit, str) and commit and set(commit) <= _HEX_DIGITS
        ):
            raise ValueError(f"commit {commit!r}")
        if dirty not in (True, False, None):
            raise ValueError(f"dirty {dirty!r}")
        return Code(
            origin=from_plain(origin, Origin, "origin"),
            version=str(value["version"]),
            commit=commit,
            dirty=dirty,
            reason=value.get("reason"),
        )
    except (AttributeError, KeyError, TypeError, ValueError, InputError) as error:
        raise InputError(
            where,
            rule=f"must hold the origin of the code ({error})",
            fix="package the code again",
        ) from None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _append(path: Path, line: str) -> None:
    """Append a line and sync it; first end a half line that a crash may have left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        # One write with O_APPEND keeps the lines of several processes apart.
        os.write(descriptor, (("\n" if torn else "") + line + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
