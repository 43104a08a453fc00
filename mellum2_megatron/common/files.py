"""Atomic writes, and checks of paths.

A crash during a write leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, first_line


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that replaces it on success, else is removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp gives 0600; a released file must be readable to others as usual.
        temporary.chmod(_without_umask(0o666))
        # Content before name: after a power loss the name must not point at missing content.
        _fsync(temporary)
        os.replace(temporary, target)
        _fsync(target.parent)
    except OSError as error:
        # The error of a full disk names no file, or the temporary one that the user never gave.
        if error.filename is None or error.filename == str(temporary):
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its name on success, else is removed.

    Args:
        path: the folder's final name.
        overwrite: replace an existing folder; it is deleted only after the new one is in place.

    Raises:
        FileExistsError: ``path`` exists, is not an empty folder, and ``overwrite`` is false.
    """
    target = Path(path)
    # An empty folder counts as free: users and schedulers often create the output folder first.
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not overwrite:
        raise FileExistsError(str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(
        tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    )
    try:
        yield temporary
        temporary.chmod(_without_umask(0o777))
        move_into_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into_place(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``, which lies on the same disk.

    An existing target is moved aside first, put back if the rename fails, and deleted only after
    the new folder is in place.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
        os.replace(target, aside / target.name)
        try:
            os.replace(folder, target)
        except BaseException:
            os.replace(aside / target.name, target)
            raise
        shutil.rmtree(aside)
    else:
        os.replace(folder, target)  # replaces an empty folder
    _fsync(target.parent)


def remove_directory(path: str | os.PathLike[str]) -> None:
    """Rename a folder, then delete it, so that no other process finds half of it.

    A crash in between leaves ``.NAME.*.old``, which the next call for a folder beside it removes.
    """
    target = Path(path)
    for leftover in target.parent.glob(".*.old"):
        shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
    os.replace(target, aside / target.name)
    shutil.rmtree(aside)


def size_text(size: float) -> str:
    """Return a number of bytes in MB or GB (powers of ten).

    >>> size_text(3_489_542), size_text(24_299_846_144)
    ('3.49 MB', '24.30 GB')
    """
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def existing_ancestor(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` or its closest existing parent, which lies on the disk of ``path``."""
    ancestor = Path(os.path.abspath(path))
    while not ancestor.exists():
        ancestor = ancestor.parent
    return ancestor


def check_writable(name: str, path: str | os.PathLike[str], *, folder: bool) -> None:
    """Check that a file or folder at ``path``, existing or not, can be written.

    Args:
        name: the user's name for it (``--out``), for messages.
        path: the file or folder.
        folder: true for a folder.

    Raises:
        InputError: the path or its closest existing parent is of the wrong kind or read-only.
    """
    target, ancestor = Path(path), existing_ancestor(path)
    if target.exists() and target.is_dir() != folder:
        kinds = ("a file", "a folder")
        raise InputError(
            f"{name} {path}", rule=f"is {kinds[not folder]}", fix=f"name {kinds[folder]}"
        )
    if ancestor != Path(os.path.abspath(path)) and not ancestor.is_dir():
        raise InputError(
            f"{name} {path}", rule=f"{ancestor} is a file, not a folder", fix="name another place"
        )
    # An existing file is replaced, not opened, so its folder must be writable.
    written = ancestor if ancestor.is_dir() else ancestor.parent
    if not os.access(written, os.W_OK | os.X_OK):
        raise InputError(
            f"{name} {path}", rule=f"{written} is not writable for you", fix="name another place"
        )


def read_text(path: Path, name: str, *, fix: str) -> str:
    """Return the text of a UTF-8 file that the user names.

    Args:
        path: file.
        name: the user's name for it (``--text notes.txt``), for the message.
        fix: fix in the message.

    Raises:
        InputError: no such file, or it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(name, rule=f"cannot be read ({first_line(error)})", fix=fix) from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` atomically, UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` to ``path`` atomically as indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _without_umask(mode: int) -> int:
    """Return the permissions ``mode`` without the bits of the process's umask."""
    umask = os.umask(0)  # a umask can be read only by setting one
    os.umask(umask)
    return mode & ~umask


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
