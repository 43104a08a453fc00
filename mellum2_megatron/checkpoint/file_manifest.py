"""The manifest of a checkpoint: size and SHA-256 of every file.

A save writes it last, and a start compares it before loading anything. The format is Megatron's
``integrity.json`` (megatron/core/dist_checkpointing/validation.py:512, 0.19.2) with sizes added, so
Megatron's ``--verify-integrity`` reads it too. Megatron hashes all files on its first rank. Here
each rank hashes the files that it wrote (checkpoint/saving.py), and before loading it checks its
share of all files (checkpoint/checks.py).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.checkpoint.folder import (
    RELEASE,
    TRACKER_FILE,
    CheckpointFolder,
    is_complete,
    iteration_folders,
    iteration_number,
)
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.json_files import load_json

logger = logging.getLogger(__name__)

MANIFEST_FILE = "integrity.json"

_ALGORITHM = "sha256"
_BLOCK_BYTES = 8 * 2**20
_MAX_THREADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size of a file in bytes, and its SHA-256 in hexadecimal digits."""

    size: int
    sha256: str


def hash_files(
    files: Iterable[Path],
    *,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, FileRecord]:
    """Hash several files at once and return their records by name.

    Args:
        files: existing files of different names.
        threads: number of files hashed at once; None (default): one for each core, at most 8.
        advance: called with the number of bytes after each read, from any thread; default nothing.

    Raises:
        OSError: a file cannot be read.
    """
    paths = list(files)
    # Threads, not processes: hashlib releases the interpreter lock while it hashes a block.
    with ThreadPoolExecutor(threads or min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        records = pool.map(lambda path: _record(path, advance), paths)
        return {path.name: record for path, record in zip(paths, records, strict=True)}


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Write the manifest into ``folder``, in one step."""
    ordered = dict(sorted(records.items()))
    files = {name: record.sha256 for name, record in ordered.items()}
    sizes = {name: record.size for name, record in ordered.items()}
    write_json(folder / MANIFEST_FILE, {"algorithm": _ALGORITHM, "files": files, "sizes": sizes})


def read_manifest(folder: Path) -> dict[str, FileRecord] | None:
    """Return the records of a checkpoint's files by name; None if it has no manifest.

    Sizes are -1 in a manifest that Megatron wrote: it has hashes only.

    Raises:
        InputError: the manifest is damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        values = load_json(path)
        if values["algorithm"] != _ALGORITHM:
            raise ValueError(f"algorithm {values['algorithm']!r}")
        sizes = values.get("sizes", {})
        return {
            str(name): FileRecord(size=int(sizes.get(name, -1)), sha256=str(digest))
            for name, digest in values["files"].items()
        }
    except FileNotFoundError:
        return None
    # KeyError and those after it: valid JSON of another form.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"must be a manifest of {_ALGORITHM} hashes ({type(error).__name__}: {error})"
        raise InputError(str(path), rule=rule, fix=_fix(folder)) from error


def check_sizes(checkpoint: CheckpointFolder) -> None:
    """Check that every file in a checkpoint's manifest exists in full length.

    Does nothing for a checkpoint without a manifest.

    Raises:
        InputError: a file is missing or of another size.
    """
    folder = checkpoint.iteration_dir
    for name, record in (read_manifest(folder) or {}).items():
        path = folder / name
        if not path.is_file():
            raise InputError(
                f"{path} is missing",
                rule="the checkpoint's manifest names it",
                fix=_fix(folder),
            )
        size = path.stat().st_size
        if record.size not in (-1, size):
            raise InputError(
                f"{path} has {size} bytes",
                rule=f"it was written with {record.size}",
                fix=_fix(folder),
            )


def check_hashes(
    checkpoint: CheckpointFolder,
    *,
    part: int = 0,
    parts: int = 1,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Compare the files of a checkpoint, or a share of them, with its manifest.

    Args:
        checkpoint: the checkpoint.
        part: index of the share, from 0 (default).
        parts: number of shares, default 1; together they cover every file once.
        threads, advance: as for `hash_files`.

    Raises:
        InputError: a file has changed, or cannot be read.
    """
    folder = checkpoint.iteration_dir
    manifest = read_manifest(folder) or {}
    if not manifest and part == 0:
        # Written by another tool, or before this project had manifests: loaded with a warning.
        logger.warning("%s has no %s, so damage would not be noticed", folder, MANIFEST_FILE)
    # Dealt out from the largest file on, so that all shares take about the same time.
    share = sorted(manifest, key=lambda name: (-manifest[name].size, name))[part::parts]
    try:
        records = hash_files((folder / name for name in share), threads=threads, advance=advance)
    except OSError as error:
        raise InputError(
            str(error.filename), rule=f"cannot be read ({error.strerror})", fix=_fix(folder)
        ) from error
    for name in share:
        read, written = records[name].sha256, manifest[name].sha256
        if read != written:
            raise InputError(
                f"{folder / name} has changed since it was written",
                rule=f"its SHA-256 is {read[:12]}.., in the manifest {written[:12]}..",
                fix=_fix(folder),
            )


def bytes_to_check(checkpoint: CheckpointFolder, *, part: int = 0, parts: int = 1) -> int:
    """Return the number of bytes that `check_hashes` reads for a share."""
    sizes = sorted(
        (record.size for record in (read_manifest(checkpoint.iteration_dir) or {}).values()),
        reverse=True,
    )
    return sum(sizes[part::parts])


def _record(path: Path, advance: Callable[[int], None]) -> FileRecord:
    # Read in blocks: a file of a checkpoint may have tens of gigabytes.
    digest, size, block = hashlib.sha256(), 0, bytearray(_BLOCK_BYTES)
    view = memoryview(block)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(view[:count])
            size += count
            advance(count)
    return FileRecord(size=size, sha256=digest.hexdigest())


def _fix(folder: Path) -> str:
    """Return the fix for a damaged checkpoint: to go back to the newest earlier complete one."""
    number = iteration_number(folder.name) or 0
    for earlier in reversed(iteration_folders(folder.parent)):
        # A release has no iteration number and counts as iteration 0.
        previous = iteration_number(earlier.name)
        if (previous or 0) < number and _looks_complete(earlier):
            tracked = RELEASE if previous is None else previous
            return (
                f"go back to {earlier.name} with "
                f"`echo {tracked} > {folder.parent / TRACKER_FILE}` and give the same command "
                "again, or copy this one again from where it is whole"
            )
    return "copy it again from where it is whole; there is no earlier one to go back to"


def _looks_complete(folder: Path) -> bool:
    """Return true if the save finished and all files have their size; nothing is hashed."""
    try:
        manifest = read_manifest(folder) or {}
        return is_complete(folder) and all(
            (folder / name).stat().st_size == record.size
            for name, record in manifest.items()
            if record.size >= 0
        )
    except (InputError, OSError):
        return False
