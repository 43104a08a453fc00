"""Temporary names of unfinished work, and the removal of those that killed processes left.

Unfinished work on ``NAME`` lies beside it as ``.NAME.new-XXXXXXXX.partial``, a file or a folder::

    .NAME.new-XXXXXXXX.partial/lock   locked while the process that made the folder lives
                               new    what is to become NAME
                               old    what NAME was, while it is replaced

The system drops a lock with its process, so whoever gets the lock has found a leftover. On a disk
without locks nobody gets one, and leftovers stay.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK, NEW, OLD = "lock", "new", "old"
"""Entries of a staging folder."""

_PREFIX, _SUFFIX = ".{name}.new-", ".partial"
_PATTERN = re.compile(r"\.(?P<name>.+)\.new-[a-z0-9_]{8}\.partial")  # tempfile's random part
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def staging(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a locked folder beside ``target`` that holds nothing else; it is removed at the end.

    Leftovers of killed processes for the same target are removed first.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    lock = None
    while lock is None:
        prefix = _PREFIX.format(name=target.name)
        stage = Path(tempfile.mkdtemp(_SUFFIX, prefix, target.parent))
        try:
            handle = os.open(stage / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # taken for a leftover before it had its lock
            continue
        lock = _locked(handle, stage / LOCK)
    try:
        yield stage
    finally:
        _remove_folder(stage, target, lock)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a locked file beside ``target``; it is removed at the end if it has its name still."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    lock = None
    while lock is None:
        handle, name = tempfile.mkstemp(_SUFFIX, _PREFIX.format(name=target.name), target.parent)
        lock = _locked(handle, Path(name))
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(lock)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes have left in a folder; what a live process uses stays.

    A target that was being replaced gets its name back.

    Args:
        folder: folder of the targets.
        name: name of one target; None: all.
    """
    try:
        entries = [Path(entry.path) for entry in os.scandir(folder)]
    except OSError:  # no such folder, or one that cannot be listed
        return
    for path in entries:
        match = _PATTERN.fullmatch(path.name)
        if match is None or name not in (None, match["name"]):
            continue
        # Another process may remove the same, and a file of another user cannot be removed.
        with contextlib.suppress(OSError):
            if not path.is_dir():
                lock = _free_lock(path)
                path.unlink()
                os.close(lock)
            elif (path / LOCK).exists():
                _remove_folder(path, folder / match["name"], _free_lock(path / LOCK))
            else:
                path.rmdir()  # killed before it had its lock, or when it had none any more


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; false where the system or the disk cannot."""
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchanged = -100, 2  # AT_FDCWD of fcntl.h, RENAME_EXCHANGE of linux/fs.h
    if rename(here, os.fsencode(first), here, os.fsencode(second), exchanged) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _locked(handle: int, path: Path) -> int | None:
    """Lock a new file; None, and closed, if another process took it for a leftover."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return handle
    if path.exists():
        return handle
    os.close(handle)
    return None


def _free_lock(path: Path) -> int:
    """Lock a file that no live process has locked.

    Raises:
        OSError: it is in use, or cannot be locked.
    """
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove_folder(stage: Path, target: Path, lock: int) -> None:
    """Remove a staging folder, its lock last; give ``target`` its name back if it has lost it."""
    if (stage / OLD).exists() and not target.exists():
        os.replace(stage / OLD, target)
    for entry in stage.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink(missing_ok=True)
    # Closed first: on a network disk an open file that is removed keeps its folder from going.
    os.close(lock)
    with contextlib.suppress(OSError):
        (stage / LOCK).unlink()
        stage.rmdir()
