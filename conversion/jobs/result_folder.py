"""A result folder: checked before it is written, written aside, resumed after an interruption.

A result grows in ``.NAME.partial/result`` beside its target and takes the target's name when it is
complete. ``.NAME.partial/journal.jsonl`` lists the units of work that are on the disk. After a
crash, a full disk or Ctrl-C the same command converts the others only. The journal's first line is
the identity of the conversion; a partial result of another identity is discarded.
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
from mellum2_megatron.common.json_files import parse_object
from mellum2_megatron.common.staging import remove_leftovers

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.jsonl"
_RESULT = "result"
# No space left; over a quota; over a limit on the size of one file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Disk space beside the tensors themselves. As a share of their bytes: headers and the archives'
# bookkeeping. As a constant: config, tokenizer and manifest.
_SPARE_SHARE, _SPARE_BYTES = 0.02, 8 * 2**20


class PartialResult:
    """A result folder while it is written.

    Attributes:
        folder: folder to write into.
        done: payload of every finished unit by name, those of an earlier attempt included.
    """

    def __init__(self, folder: Path, journal: TextIO, done: dict[str, Any]) -> None:
        self.folder = folder
        self.done = done
        self._journal = journal
        self._lock = threading.Lock()

    def mark(self, unit: str, payload: Any, files: Mapping[str, int]) -> None:
        """List ``unit`` in the journal, once its bytes are on the disk; any thread may call it.

        Args:
            unit: name of the unit.
            payload: the unit's data for completing the result; JSON values.
            files: least size in bytes of each file with a part of the unit, by path relative to
                the folder.
        """
        line = json.dumps({"unit": unit, "files": dict(files), "payload": payload})
        with self._lock:
            self._journal.write(line + "\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())
            # Through JSON, as when it is resumed: `finish` gets the same values in both cases.
            self.done[unit] = json.loads(line)["payload"]


def partial_folder(target: Path) -> Path:
    """Return the folder that a result grows in until it is complete."""
    # Beside the target, so that taking its name is one rename on one file system.
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
    """Yield a folder to write; it becomes ``target`` on success and is kept after a failure.

    Args:
        target: folder of the result.
        source: folder that is converted; the target must neither be it nor hold it.
        units: size in bytes of each unit of work; the disk must have room for the unfinished ones.
        overwrite: replace an earlier result, which is kept until the new one is complete.
        identity: source and options as JSON values; only a partial result of the same identity is
            resumed.

    Raises:
        InputError: the target exists and ``overwrite`` is false, or must not be replaced, or is
            being written by another process. An InputError of the body removes the partial result.
        WorkError: the disk is too full, or writing failed.
    """
    partial = partial_folder(target)
    remove_leftovers(target.parent, target.name)
    _remove_finished(partial)
    check_target(target, source, overwrite)
    first_line = json.dumps(identity, sort_keys=True)
    done = _finished(partial, first_line)
    check_space(target, sum(nbytes for unit, nbytes in units.items() if unit not in done))
    try:
        with _locked_journal(partial) as journal:
            # Read again under the lock: another process may have written since.
            done = _finished(partial, first_line)
            if done:
                logger.warning(
                    "continuing %s: %d of %d parts are there", partial, len(done), len(units)
                )
                journal.write("\n")  # ends a line that was cut off
            else:
                shutil.rmtree(partial / _RESULT, ignore_errors=True)
                journal.truncate(0)
                journal.write(first_line + "\n")
            journal.flush()
            (partial / _RESULT).mkdir(exist_ok=True)
            result = PartialResult(partial / _RESULT, journal, done)
            try:
                yield result
                move_into_place(result.folder, target)
            except InputError:
                # The source is bad, so its finished units are of no use to another attempt.
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
                    # The journal last: without it the folder is nobody's.
                    shutil.rmtree(result.folder, ignore_errors=True)
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
    traces = (TRACKER_FILE, "config.json", "model.safetensors")
    if not any((target / name).exists() for name in traces):
        raise InputError(
            f"target {target}",
            rule=(
                "--overwrite replaces an earlier conversion only, and this folder does not hold one"
            ),
            fix="name another folder, or empty this one yourself",
        )


def check_space(target: Path, nbytes: int) -> int:
    """Return the free space of the target's disk in bytes.

    Raises:
        WorkError: the disk has no room for tensors of ``nbytes`` bytes.
    """
    parent = existing_ancestor(target)
    free = shutil.disk_usage(parent).free
    needed = int(nbytes * (1 + _SPARE_SHARE)) + _SPARE_BYTES
    if free < needed:
        raise WorkError(
            f"disk of {parent} has {size_text(free)} free, {target} needs {size_text(needed)}",
            fix="free space or name a folder on another disk; nothing was written",
        )
    return free


def finished_units(target: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the payload of each unit, by name, that an earlier attempt at ``target`` finished."""
    return _finished(partial_folder(target), json.dumps(identity, sort_keys=True))


def _finished(partial: Path, first_line: str) -> dict[str, Any]:
    """Return the payload of each unit, by name, that an earlier attempt finished.

    A unit counts only if the attempt had the same identity and the unit's files are complete.

    Raises:
        InputError: ``partial`` exists and is not a partial result.
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
    if lines[0] != first_line:
        logger.warning(
            "%s belongs to another conversion (other source, options or version): discarded",
            partial,
        )
        return {}
    done = {}
    for line in lines[1:]:
        try:
            entry = parse_object(line)
            # Units in a file that was deleted, or cut short by a power failure, are lost.
            complete = all(
                (partial / _RESULT / name).stat().st_size >= size
                for name, size in entry["files"].items()
            )
        except (ValueError, OSError):  # a line that was cut off; a file that is gone
            continue
        if complete:
            done[entry["unit"]] = entry["payload"]
    return done


def _remove_finished(partial: Path) -> None:
    """Remove the folder of a process that was killed after its result had taken its name.

    Raises:
        InputError: another process has just begun to write it.
    """
    if partial.is_dir() and {entry.name for entry in partial.iterdir()} <= {JOURNAL_FILE}:
        with _locked_journal(partial):
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked_journal(partial: Path) -> Iterator[TextIO]:
    """Open the journal of ``partial`` for this process alone.

    Raises:
        InputError: another process has it open.
    """
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / JOURNAL_FILE
    with path.open("a+", encoding="utf-8") as journal:
        try:
            # The system drops the lock with the process: a killed one leaves none behind.
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between `open` and `flock` the other process may have finished and removed the file.
            mine = path.exists() and os.path.samestat(os.fstat(journal.fileno()), path.stat())
        except BlockingIOError:
            mine = False
        if not mine:
            raise InputError(
                str(partial),
                rule="another process is writing it",
                fix="wait for that conversion, or end it",
            )
        yield journal


def _work_error(target: Path, error: Exception, partial: Path | None) -> WorkError | None:
    """Return the error to report for a failed write; None for a programming error.

    A programming error keeps its traceback.

    Args:
        target: folder of the result.
        error: error of the write.
        partial: folder in which finished units are kept; None: nothing is kept.
    """
    # The system's error may lie behind another: torch.save reports "unexpected pos" when its
    # stream's write has failed.
    system: BaseException | None = error
    while system is not None and not isinstance(system, OSError):
        system = system.__cause__ or system.__context__
    text = str(system or error)
    if partial is None:
        left = "nothing was left behind, the source is untouched"
    else:
        left = (
            f"finished parts are kept in {partial}: the same command continues them, "
            "or delete the folder"
        )
    # safetensors passes on the system's message without its error number.
    full = system is not None and system.errno in _FULL
    if full or any(os.strerror(code) in text for code in _FULL):
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
