"""Writing a result folder: refuse what would harm, check the space, write aside, and say plainly
what went wrong.

A result grows in ``.NAME.partial/result`` beside its target and takes its name when it is complete.
Units of work that are on the disk are listed in ``.NAME.partial/journal.jsonl``: after a crash, a
full disk or Ctrl-C the same command does only the others. The journal's first line says what is
converted; a partial result of anything else is discarded.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from mellum2_megatron.checkpoint.folder import TRACKER_FILE, iteration_folders
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import (
    check_writable,
    existing_ancestor,
    move_into_place,
    size_text,
)

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.jsonl"
_RESULT = "result"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Beside the tensors' own bytes: headers and archives' bookkeeping (a share of them), config,
# tokenizer, manifest.
_SPARE_SHARE, _SPARE_BYTES = 0.02, 8 * 2**20


class PartialResult:
    """A result folder while it is written.

    Attributes:
        folder: where to write.
        done: what `mark` was given for each unit that an earlier attempt or this one has finished.
    """

    def __init__(self, folder: Path, journal: TextIO, done: dict[str, Any]) -> None:
        self.folder = folder
        self.done = done
        self._journal = journal
        self._lock = threading.Lock()

    def mark(self, unit: str, payload: Any, files: Mapping[str, int]) -> None:
        """Note that ``unit`` is finished and on the disk.

        Args:
            payload: what is needed of it to finish the result; goes through JSON.
            files: files it lies in (relative to the folder), each with the size it has at least.
        """
        line = json.dumps({"unit": unit, "files": dict(files), "payload": payload})
        with self._lock:
            self._journal.write(line + "\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())
            self.done[unit] = json.loads(line)["payload"]


def partial_folder(target: Path) -> Path:
    """Where a result grows until it is complete."""
    return target.parent / f".{target.name}.partial"


@contextmanager
def result_folder(
    target: Path,
    *,
    source: Path,
    units: Mapping[str, int],
    overwrite: bool,
    identity: Mapping[str, Any],
) -> Iterator[PartialResult]:
    """Yield a folder to write; it becomes ``target`` on success and waits to be continued after a
    failure.

    Args:
        source: what is converted; a target that is it or holds it is refused.
        units: bytes of each unit of work; the disk must have room for those that are not done yet.
        overwrite: replace an earlier result (moved aside until the new one is complete).
        identity: what is converted, and how, as plain values: a partial result is continued if its
            own is the same.

    Raises:
        InputError: the target exists and ``overwrite`` is false, or is something that must not be
            replaced; another process is writing it. An InputError of the body removes the partial
            result.
        WorkError: the disk is too full, or writing failed.
    """
    check_target(target, source, overwrite)
    partial = partial_folder(target)
    first = _first_line(identity)
    done = _finished(partial, first)
    check_space(target, sum(nbytes for unit, nbytes in units.items() if unit not in done))
    try:
        with _locked_journal(partial) as journal:
            done = _finished(partial, first)  # again, now that nobody else writes
            _begin(partial, journal, None if done else first)
            if done:
                logger.warning(
                    "continuing %s: %d of %d parts are there", partial, len(done), len(units)
                )
            result = PartialResult(partial / _RESULT, journal, done)
            try:
                yield result
                move_into_place(result.folder, target)
            except InputError:
                done.clear()
                raise
            except KeyboardInterrupt:
                if done:
                    logger.warning(
                        "%d of %d parts are kept in %s: the same command continues",
                        len(done),
                        len(units),
                        partial,
                    )
                raise
            finally:
                if not done or not result.folder.exists():
                    shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        work_error = _work_error(target, error, partial if partial.exists() else None)
        if work_error is None:
            raise
        raise work_error from error


def check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Refuse a target that must not be written.

    Raises:
        InputError: it is or holds the source, exists without ``overwrite``, or does not look like
            an earlier result.
    """
    real, origin = target.resolve(), source.resolve()
    if real == origin or real in origin.parents:
        raise InputError(
            f"target {target}",
            rule=f"it must not be or hold the source {source}",
            fix="name another",
        )
    check_writable("target", target, folder=True)
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"target {target}",
            rule="it exists and is not empty",
            fix="name another folder, or pass --overwrite",
        )
    iterations = [path.name for path in iteration_folders(target) if path.name != "release"]
    if iterations:
        raise InputError(
            f"target {target} holds {', '.join(iterations[:3])}",
            rule="training checkpoints are never overwritten",
            fix="name another folder",
        )
    if not any(
        (target / name).exists() for name in (TRACKER_FILE, "config.json", "model.safetensors")
    ):
        raise InputError(
            f"target {target}",
            rule="--overwrite replaces an earlier conversion only, and this folder does not hold one",
            fix="name another folder, or empty this one yourself",
        )


def check_space(target: Path, nbytes: int) -> int:
    """Return the free bytes of the target's disk.

    Raises:
        WorkError: it has no room for ``nbytes`` of tensors.
    """
    parent = existing_ancestor(target)
    free, needed = shutil.disk_usage(parent).free, int(nbytes * (1 + _SPARE_SHARE)) + _SPARE_BYTES
    if free < needed:
        raise WorkError(
            f"disk of {parent} has {size_text(free)} free, {target} needs {size_text(needed)}",
            fix="free space or name a folder on another disk; nothing was written",
        )
    return free


def finished_units(target: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The payload of every unit that a conversion to ``target`` would not do again."""
    return _finished(partial_folder(target), _first_line(identity))


# ---------------------------------------------------------------------------------------------------------------------


def _first_line(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)


def _finished(partial: Path, first: str) -> dict[str, Any]:
    """The payloads of the units that an earlier attempt at the same conversion has finished and
    that are still whole.

    Raises:
        InputError: something that is not a partial result has its name.
    """
    if not partial.exists():
        return {}
    journal = partial / JOURNAL_FILE
    if not journal.is_file():
        if any(partial.iterdir()):
            raise InputError(
                str(partial),
                rule=f"it has no {JOURNAL_FILE}, so no conversion made it",
                fix="move it away",
            )
        return {}
    lines = journal.read_text(encoding="utf-8").splitlines()
    if not lines:
        return {}
    if lines[0] != first:
        logger.warning(
            "%s is left of another conversion (other source, options or version): discarded",
            partial,
        )
        return {}
    done = {}
    for line in lines[1:]:
        try:
            entry = json.loads(line)
            whole = all(
                (partial / _RESULT / name).stat().st_size >= size
                for name, size in entry["files"].items()
            )
        except (ValueError, OSError):  # cut off in the middle of a line; a file gone
            continue
        if whole:
            done[entry["unit"]] = entry["payload"]
    return done


@contextmanager
def _locked_journal(partial: Path) -> Iterator[TextIO]:
    """Open the journal of ``partial`` for this process alone."""
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / JOURNAL_FILE
    with path.open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.exists() and os.path.samestat(os.fstat(journal.fileno()), path.stat())
        except BlockingIOError:
            mine = False
        if not mine:  # locked, or just finished and removed
            raise InputError(
                str(partial),
                rule="another process is writing it",
                fix="wait for that conversion, or end it",
            )
        yield journal


def _begin(partial: Path, journal: TextIO, first: str | None) -> None:
    """Start the journal and the result afresh with the line ``first``; continue both when it is
    None."""
    if first is not None:
        shutil.rmtree(partial / _RESULT, ignore_errors=True)
        journal.truncate(0)
    journal.write((first or "") + "\n")  # an empty line ends one that was cut off
    journal.flush()
    (partial / _RESULT).mkdir(exist_ok=True)


def _work_error(target: Path, error: Exception, partial: Path | None) -> WorkError | None:
    """What to tell the user of a failed write; None for an error that is ours and deserves its
    traceback."""
    system = _system_error(error)
    text = str(system or error)
    left = (
        "nothing was left behind, the source is untouched"
        if partial is None
        else f"what was done is kept in {partial} and the same command continues it; delete it if you will not"
    )
    if (system is not None and system.errno in _FULL) or any(
        os.strerror(code) in text for code in _FULL
    ):
        return WorkError(
            f"the disk filled up while writing {target} ({text})",
            fix=f"free space or name a folder on another disk; {left}",
        )
    if system is not None or isinstance(error, SafetensorError):
        return WorkError(
            f"writing {target} failed ({text})",
            fix=f"check the disk and the folder's permissions; {left}",
        )
    return None


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error behind ``error``: torch.save reports "unexpected pos" when its stream's
    write has failed."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
