"""Writing a result folder: refuse what would harm, check the space, write aside, and say plainly what went wrong."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mellum2_megatron.checkpoint_folder import TRACKER_FILE, iteration_folders
from mellum2_megatron.errors import InputError, WorkError
from mellum2_megatron.files import atomic_directory, check_writable, size_text

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Beside the tensors' own bytes: headers and archives' bookkeeping (a share of them), config, tokenizer, manifest.
_SPARE_SHARE, _SPARE_BYTES = 0.02, 8 * 2**20


@contextmanager
def result_folder(target: Path, *, source: Path, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; it becomes ``target`` on success and disappears on any error.

    Args:
        source: what is converted; a target that is it or holds it is refused.
        nbytes: size of the tensors to be written; the disk must have room for them.
        overwrite: replace an earlier result (moved aside until the new one is complete).

    Raises:
        InputError: the target exists and ``overwrite`` is false, or is something that must not be replaced.
        WorkError: the disk is too full, or writing failed.
    """
    _check_target(target, source, overwrite)
    _check_space(target, nbytes)
    try:
        with atomic_directory(target, overwrite=overwrite) as folder:
            yield folder
    except (OSError, SafetensorError, RuntimeError) as error:
        work_error = _work_error(target, error)
        if work_error is None:
            raise
        raise work_error from error


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    real, origin = target.resolve(), source.resolve()
    if real == origin or real in origin.parents:
        raise InputError(f"target {target}", rule=f"it must not be or hold the source {source}", fix="name another")
    check_writable("target", target, folder=True)
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"target {target}", rule="it exists and is not empty", fix="name another folder, or pass --overwrite"
        )
    iterations = [path.name for path in iteration_folders(target) if path.name != "release"]
    if iterations:
        raise InputError(
            f"target {target} holds {', '.join(iterations[:3])}",
            rule="training checkpoints are never overwritten",
            fix="name another folder",
        )
    if not any((target / name).exists() for name in (TRACKER_FILE, "config.json", "model.safetensors")):
        raise InputError(
            f"target {target}",
            rule="--overwrite replaces an earlier conversion only, and this folder does not hold one",
            fix="name another folder, or empty this one yourself",
        )


def _check_space(target: Path, nbytes: int) -> None:
    parent = target.absolute()
    while not parent.exists():
        parent = parent.parent
    free, needed = shutil.disk_usage(parent).free, int(nbytes * (1 + _SPARE_SHARE)) + _SPARE_BYTES
    if free < needed:
        raise WorkError(
            f"disk of {parent} has {size_text(free)} free, {target} needs {size_text(needed)}",
            fix="free space or name a folder on another disk; nothing was written",
        )


def _work_error(target: Path, error: Exception) -> WorkError | None:
    """What to tell the user of a failed write; None for an error that is ours and deserves its traceback."""
    system = _system_error(error)
    text = str(system or error)
    if (system is not None and system.errno in _FULL) or any(os.strerror(code) in text for code in _FULL):
        return WorkError(
            f"the disk filled up while writing {target} ({text})",
            fix="free space or name a folder on another disk; nothing was left behind, the source is untouched",
        )
    if system is not None or isinstance(error, SafetensorError):
        return WorkError(f"writing {target} failed ({text})", fix="check the disk and the folder's permissions")
    return None


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error behind ``error``: torch.save reports "unexpected pos" when its stream's write has failed."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
