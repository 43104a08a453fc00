"""Atomic writes, and checks of paths.

A crash during a write leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.staging import (
    NEW,
    OLD,
    exchange,
    remove_leftovers,
    staged_file,
    staging,
)

LARGEST_TEXT = 1 << 26
"""Bytes of the largest text or JSON file that is read whole; a large tokenizer.json has 35 MB."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that replaces it on success, else is removed."""
    target = Path(path)
    with staged_file(target) as temporary:
        try:
            yield temporary
            # mkstemp gives 0600; a released file must be readable to others as usual.
            temporary.chmod(_without_umask(0o666))
            # Content before name: after a power loss the name must not point at missing content.
            _fsync(temporary)
            os.replace(temporary, target)
            _fsync(target.parent)
        except OSError as error:
            # The error of a full disk names no file, or the temporary one that no user gave.
            if error.filename is None or error.filename == str(temporary):
                error.filename = str(target)
            raise


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its name on success, else is removed.

    Args:
        path: the folder's final name.
        overwrite: replace an existing folder; it is deleted only after the new one is in place.

    Raises:
        FileExistsError: ``path`` exists, is not an empty folder, and ``overwrite`` is false.
        OSError: the same, found at the end.
    """
    target = Path(path)
    remove_leftovers(target.parent, target.name)  # gives a target of a killed process its name back
    if _occupied(target) and not overwrite:
        raise FileExistsError(str(target))
    with staging(target) as stage:
        folder = stage / NEW
        folder.mkdir()
        yield folder
        folder.chmod(_without_umask(0o777))
        if overwrite:
            _take_name(stage, target)
        else:
            os.replace(folder, target)  # replaces an empty folder
        _fsync(target.parent)


def move_into_place(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``, which lies on the same disk.

    An existing target is deleted only after the new folder is in place.
    """
    # Through a folder of its own: what is replaced must never be found under the name ``folder``.
    with staging(target) as stage:
        os.replace(folder, stage / NEW)
        try:
            _take_name(stage, target)
        except BaseException:
            os.replace(stage / NEW, folder)
            raise
        _fsync(target.parent)


def remove_directory(path: str | os.PathLike[str]) -> None:
    """Rename a folder, then delete it, so that no other process finds half of it.

    What a crash in between leaves is removed by the next call for any folder beside it.
    """
    target = Path(path)
    remove_leftovers(target.parent)
    with staging(target) as stage:
        os.replace(target, stage / NEW)


def _occupied(target: Path) -> bool:
    # An empty folder counts as free: users and schedulers often create the output folder first.
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


def _take_name(stage: Path, target: Path) -> None:
    """Give the new folder in a staging folder its name; what had the name ends up in there."""
    if not _occupied(target):
        os.replace(stage / NEW, target)  # replaces an empty folder
    elif not exchange(stage / NEW, target):
        # A crash between the two leaves no target, until `remove_leftovers` puts it back.
        os.replace(target, stage / OLD)
        os.replace(stage / NEW, target)


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


def check_size(file: Path, size: int, *, fix: str) -> None:
    """Refuse a file that is missing or has another size than was written down.

    Args:
        file: the file.
        size: its bytes.
        fix: end of the message.

    Raises:
        InputError: see above.
    """
    actual = file.stat().st_size if file.is_file() else None
    if actual != size:
        state = "is missing" if actual is None else f"has {actual:,}"
        raise InputError(str(file), rule=f"it should have {size:,} bytes and {state}", fix=fix)


def check_new_folder(target: Path, *, overwrite: bool, marker: str, kind: str) -> None:
    """Refuse an ``--output`` that cannot be made or must not be replaced; remove what a kill left.

    Args:
        target: the folder.
        overwrite: true to replace one of the same kind.
        marker: file that each folder of this kind has.
        kind: the kind with its article, for messages.

    Raises:
        InputError: see above.
    """
    check_writable("--output", target, folder=True)
    remove_leftovers(target.parent, target.name)
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not overwrite:
        raise InputError(
            f"--output {target}",
            rule="it exists and is not empty",
            fix="choose another folder, or add --overwrite",
        )
    # A mistyped --output must not delete somebody's other folder.
    if occupied and not (target / marker).is_file():
        raise InputError(
            f"--output {target}",
            rule=f"only {kind} may be replaced",
            fix="choose another folder",
        )


def read_text(path: Path, name: str, *, fix: str) -> str:
    """Return the text of a UTF-8 file that the user names.

    Args:
        path: file.
        name: the user's name for it (``--text notes.txt``), for the message.
        fix: fix in the message.

    Raises:
        InputError: no such file, or it cannot be read, or has more than `LARGEST_TEXT` bytes.
    """
    try:
        # A pipe may stand for a file that a user names, as in bash's <(command).
        content = read_bytes(path, pipes=True).decode("utf-8")
        return content.replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(name, rule=f"cannot be read ({first_line(error)})", fix=fix) from None


def read_bytes(path: Path, *, largest: int = LARGEST_TEXT, pipes: bool = False) -> bytes:
    """Return the content of a file, in bounded time and memory.

    Args:
        path: the file.
        largest: number of bytes that it may have, default `LARGEST_TEXT`.
        pipes: read pipes and terminals as well, default false; reading one may wait for ever.

    Raises:
        OSError: it cannot be read, is larger, or is a device, socket or pipe.
    """
    # O_NONBLOCK: opening a pipe that nobody writes to would wait.
    waits = 0 if pipes else os.O_NONBLOCK
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | waits)) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) and not pipes:
            raise OSError(errno.EINVAL, "no regular file", str(path))
        content = stream.read(largest + 1) if status.st_size <= largest else None
    if content is None or len(content) > largest:
        raise OSError(errno.EFBIG, f"larger than {largest:,} bytes", str(path))
    return content


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
