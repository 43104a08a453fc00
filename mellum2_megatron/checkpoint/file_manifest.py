"""The manifest of a checkpoint: size and SHA-256 of every file, written last, compared before
anything is loaded.

It is Megatron's own ``integrity.json`` (megatron/core/dist_checkpointing/validation.py:512,
0.19.2), which its ``--verify-integrity`` reads too, with the sizes beside the hashes. Megatron's
first rank hashes the files of all; here each rank hashes what it has written (`saving.py`), and
checks its share of the files before it loads (`train.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.checkpoint.folder import (
    TRACKER_FILE,
    CheckpointFolder,
    is_complete,
    iteration_folders,
    iteration_number,
)
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json

logger = logging.getLogger(__name__)

MANIFEST_FILE = "integrity.json"

_ALGORITHM = "sha256"
_BLOCK = 8 * 2**20
_THREADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file of a checkpoint: its size in bytes, and its SHA-256 in hexadecimal digits."""

    size: int
    sha256: str


def hash_files(
    files: Iterable[Path],
    *,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, FileRecord]:
    """Return the records of files by name, hashed side by side (hashlib lets other threads run).

    Args:
        files: existing files of different names.
        threads: how many at once; None takes one a core, at most 8.
        advance: told how many bytes were read, from any thread.

    Raises:
        OSError: a file cannot be read.
    """
    paths = list(files)
    with ThreadPoolExecutor(threads or min(_THREADS, len(os.sched_getaffinity(0)))) as pool:
        records = pool.map(lambda path: _record(path, advance), paths)
        return {path.name: record for path, record in zip(paths, records, strict=True)}


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Write the manifest into ``folder``, at once or not at all."""
    ordered = dict(sorted(records.items()))
    files = {name: record.sha256 for name, record in ordered.items()}
    sizes = {name: record.size for name, record in ordered.items()}
    write_json(folder / MANIFEST_FILE, {"algorithm": _ALGORITHM, "files": files, "sizes": sizes})


def read_manifest(folder: Path) -> dict[str, FileRecord] | None:
    """Return the records of a checkpoint's files by name; None if it has no manifest.

    A manifest that Megatron wrote has no sizes, which are then -1.

    Raises:
        InputError: it is damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["algorithm"] != _ALGORITHM:
            raise ValueError(f"algorithm {values['algorithm']!r}")
        sizes = values.get("sizes", {})
        return {
            str(name): FileRecord(size=int(sizes.get(name, -1)), sha256=str(digest))
            for name, digest in values["files"].items()
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"must be a manifest of {_ALGORITHM} hashes ({type(error).__name__}: {error})"
        raise InputError(str(path), rule=rule, fix=_fix(folder)) from error


def check_sizes(checkpoint: CheckpointFolder) -> None:
    """Check that every file of a checkpoint's manifest is there in full; one without a manifest
    cannot be checked.

    Raises:
        InputError: a file is missing or of another size.
    """
    folder = checkpoint.iteration_dir
    for name, record in (read_manifest(folder) or {}).items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None:
            raise InputError(
                f"{folder / name} is missing",
                rule="the checkpoint's manifest names it",
                fix=_fix(folder),
            )
        if record.size not in (-1, size):
            raise InputError(
                f"{folder / name} has {size} bytes",
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
    """Compare the files of a checkpoint, or every ``parts``-th of them, with its manifest.

    Raises:
        InputError: a file has changed, or cannot be read.
    """
    folder = checkpoint.iteration_dir
    manifest = read_manifest(folder) or {}
    if not manifest and part == 0:
        logger.warning("%s has no %s, so damage would not be noticed", folder, MANIFEST_FILE)
    mine = sorted(manifest, key=lambda name: (-manifest[name].size, name))[part::parts]
    try:
        found = hash_files((folder / name for name in mine), threads=threads, advance=advance)
    except OSError as error:
        raise InputError(
            str(error.filename), rule=f"cannot be read ({error.strerror})", fix=_fix(folder)
        ) from error
    for name in mine:
        if found[name].sha256 != manifest[name].sha256:
            raise InputError(
                f"{folder / name} has changed since it was written",
                rule=f"its SHA-256 is {found[name].sha256[:12]}.., the manifest says {manifest[name].sha256[:12]}..",
                fix=_fix(folder),
            )


def bytes_to_check(checkpoint: CheckpointFolder, *, part: int = 0, parts: int = 1) -> int:
    """Return how many bytes `check_hashes` is going to read."""
    sizes = sorted(
        (record.size for record in (read_manifest(checkpoint.iteration_dir) or {}).values()),
        reverse=True,
    )
    return sum(sizes[part::parts])


def _record(path: Path, advance: Callable[[int], None]) -> FileRecord:
    digest, size, block = hashlib.sha256(), 0, bytearray(_BLOCK)
    view = memoryview(block)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(view[:count])
            size += count
            advance(count)
    return FileRecord(size=size, sha256=digest.hexdigest())


def _fix(folder: Path) -> str:
    """Offer the newest earlier checkpoint that looks whole."""
    number = iteration_number(folder.name)
    earlier = [
        each
        for each in iteration_folders(folder.parent)
        if (iteration_number(each.name) or 0) < (number or 0)
    ]
    for candidate in reversed(earlier):
        if _looks_whole(candidate):
            previous = iteration_number(candidate.name)
            name = "release" if previous is None else previous
            return (
                f"go back to {candidate.name} with `echo {name} > {folder.parent / TRACKER_FILE}` and give the same "
                "command again, or copy this one again from where it is whole"
            )
    return "copy it again from where it is whole; there is no earlier one to go back to"


def _looks_whole(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder) or {}
        return is_complete(folder) and all(
            (folder / name).stat().st_size == record.size
            for name, record in manifest.items()
            if record.size >= 0
        )
    except (InputError, OSError):
        return False
