"""Reports the one cause of a failed run, and leaves no half-written checkpoint behind.

Several ranks fail at once, most of them only because another one did. So no rank prints its own
failure: each leaves a report (`report_failure`) in the file that torch's launcher names for
it, and the launcher prints the root cause (`launchers.local`). A rank without such a launcher
prints its own.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mellum2_megatron.checkpoint.folder import (
    RELEASE,
    TRACKER_FILE,
    how_to_resume,
    is_complete,
    iteration_folder_name,
    iteration_folders,
    iteration_number,
    tracked_iteration,
    write_tracker,
)
from mellum2_megatron.common.errors import Mellum2Error, WorkError, first_line
from mellum2_megatron.common.files import existing_ancestor

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Set for every rank by torch's process launcher
(torch/distributed/elastic/multiprocessing/api.py, 2.15)."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Kind = Literal["explained", "unexpected", "echo"]

_ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "recvValue failed",
)
"""Errors of gloo, NCCL and the TCPStore on a rank whose peer is gone."""

_NOT_FINITE = re.compile(
    r"Rank (\d+), .*iteration (\d+): Unexpected result (.*) \(message='(.*)'\)", re.DOTALL
)
"""Error of `RerunStateMachine.validate_result` (megatron/core/rerun_state_machine.py:534, 0.19.2).
It checks each micro-batch's loss (`training.step.sum_loss`) and each bucket's gradient norm
(core/distributed/param_and_grad_buffer.py:339)."""

_GRADIENT_WORD = "grad"
"""Part of each message of Megatron's checks on gradients, as in "found NaN in local grad norm for
bucket #0" (core/distributed/param_and_grad_buffer.py:349-369, 0.19.2); not of
`training.step.LOSS_CHECK`."""

_LAST_LINES = 12
"""Lines of an unexpected error's message that are shown."""

_GRACE_SECONDS = 25
"""Seconds after the first failure from which a SIGKILL is the agent's: a little below its 30."""

_FULL_BYTES = 16 * 2**20
"""Free bytes below which a disk counts as full once a save has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFailure:
    """End of one rank.

    Attributes:
        rank: rank number.
        exit_code: exit code of the process; minus the signal's number if a signal ended it.
        kind: "explained" has a message for the user, "echo" is the effect of another rank's
            failure, "unexpected" is the rest.
        message: one line or a few, without traceback; empty if the process left no report.
        traceback: Python traceback; empty if the process left no report.
        ended: time of the end, seconds since the epoch.
    """

    rank: int
    exit_code: int
    kind: Kind = "unexpected"
    message: str = ""
    traceback: str = ""
    ended: int = 0

    @classmethod
    def of(
        cls, rank: int, exit_code: int, report: Mapping[str, Any], ended: int = 0
    ) -> RankFailure:
        """Combine a process's exit code with the report it left, if any (`report_failure`)."""
        message = report.get("message")
        if not isinstance(message, Mapping):
            return cls(rank=rank, exit_code=exit_code, ended=ended)
        extra = message.get("extraInfo", {})
        return cls(
            rank=rank,
            exit_code=exit_code,
            kind=extra.get("kind", "unexpected"),
            message=str(message.get("message", "")),
            traceback=str(extra.get("py_callstack", "")),
            ended=ended,
        )

    def error(self, traceback_file: Path | None, output: Path | None) -> Mellum2Error:
        """Return the error to show: the rank's own message, or the rank and what ended it.

        Args:
            traceback_file: file of the whole traceback; None: there is none.
            output: run folder, whose checkpoints decide what the fix says; None: the fix does not
                mention a restart, about which somebody else decides.
        """
        again = "" if output is None else f"; {how_to_resume(output)}"
        if self.kind == "explained":
            return RankError(self.message, exit_code=self.exit_code)
        if self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            return WorkError(
                f"rank {self.rank} was ended by {name}",
                fix="if nobody sent it, the machine ran out of memory (see dmesg): lower "
                f"schedule.micro_batch_size{again}",
            )
        last = "\n".join(self.message.strip().splitlines()[-_LAST_LINES:]) or "it left no message"
        if traceback_file:
            more = f"the whole traceback is in {traceback_file}"
        else:
            more = "run with --verbose for more"
        return WorkError(
            f"rank {self.rank} failed with exit code {self.exit_code}: {last}",
            fix=f"{more}{again}",
        )


class RankError(Mellum2Error):
    """A rank's own message, complete, and the exit code for it."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def root_cause(failures: list[RankFailure]) -> RankFailure:
    """Return the failure that caused the others.

    An explained failure comes first, then a signal, an unexpected one, and an echo. SIGTERM comes
    last: the agent ends the other ranks with it, and with SIGKILL those that are still there after
    30 s (torch/distributed/elastic/multiprocessing/api.py:1023, 2.15).
    """
    first_end = min(failure.ended for failure in failures)

    def order(failure: RankFailure) -> tuple[int, int]:
        if failure.kind == "explained":
            return 0, failure.rank
        if failure.exit_code < 0:
            late = failure.ended - first_end >= _GRACE_SECONDS
            by_agent = failure.exit_code == -signal.SIGTERM or (
                failure.exit_code == -signal.SIGKILL and late
            )
            return (4 if by_agent else 1), failure.rank
        return (3 if failure.kind == "echo" else 2), failure.rank

    return min(failures, key=order)


# ------------------------------------------------------------------------------------------------
# In a rank
# ------------------------------------------------------------------------------------------------


def report_failure(error: BaseException, *, to_launcher: bool, verbose: bool) -> int:
    """Report the exception that ended this rank; call it while that is being handled.

    Args:
        error: exception that ended the rank.
        to_launcher: write to the report file that a launcher of ours reads, not to stderr.
        verbose: print the traceback too.

    Returns:
        Exit code for the process: 2 for bad input, else 1.
    """
    kind: Kind = "unexpected"
    if isinstance(error, Mellum2Error):
        kind = "explained"
    elif is_echo(error):
        kind = "echo"
    message = str(error) if kind == "explained" else f"{type(error).__name__}: {error}"
    # Keys and the str(int()) as torch reads them
    # (torch/distributed/elastic/multiprocessing/errors/__init__.py, 2.15).
    extra = {
        "py_callstack": traceback.format_exc(),
        "timestamp": str(int(time.time())),
        "kind": kind,
    }
    file = os.environ.get(ERROR_FILE_VARIABLE) if to_launcher else None
    written = False
    if file:
        with suppress(OSError):  # a full disk, for one: the message then goes to stderr
            Path(file).write_text(
                json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8"
            )
            written = True
    if verbose or (kind == "unexpected" and not written):
        sys.stderr.write(extra["py_callstack"])
    if not written:
        sys.stderr.write(f"error: rank {os.environ.get('RANK', '0')}: {message}\n")
    return error.exit_code if isinstance(error, Mellum2Error) else 1


@contextmanager
def explained(output: Path) -> Iterator[None]:
    """Turn the exceptions that a user can act on into a `WorkError`; others pass.

    These are non-finite values, errors of the operating system (`OSError`), and a checkpoint that
    could not be written. In the last case Megatron collects the ranks' exceptions in a
    `CheckpointException`, where they have lost their causes.

    Args:
        output: output folder of the run, with the files of a failed save still in it: they are what
            fills the disk.

    Raises:
        WorkError: the reason, and a fix.
    """
    try:
        yield
    except Mellum2Error:
        raise
    except BaseException as error:
        work_error = _explain(error, output)
        if work_error is None:
            raise
        raise work_error from error


def _explain(error: BaseException, output: Path) -> WorkError | None:
    causes = list(_causes(error))
    matches = (_NOT_FINITE.match(str(cause)) for cause in causes)
    not_finite = next((match for match in matches if match), None)
    if not_finite is not None:
        rank, iteration, value, message = not_finite.groups()
        kind = "gradient" if is_gradient_check(message) else "loss"
        number = re.search(r"-?(inf|nan)", value)
        shown = number.group() if number else value
        # Megatron counts a step when it begins (rerun_state_machine.py:303, 0.19.2), and its
        # message adds one more.
        return WorkError(
            f"the {kind} is {shown} on rank {rank} at step {int(iteration) - 1}; "
            "nothing was saved after it",
            fix="look at the metrics before that step; resume from an earlier checkpoint with a "
            "lower optimizer.lr or a smaller optimizer.clip_grad",
        )
    system_error = next((cause for cause in causes if isinstance(cause, OSError)), None)
    is_save = _is_checkpoint_error(error) and error.args[0] == "write"
    if is_echo(error) or (system_error is None and not is_save):
        return None
    event = "a checkpoint could not be written" if is_save else "the run stopped"
    reasons = "; ".join(
        dict.fromkeys(first_line(cause) for cause in causes if not _is_checkpoint_error(cause))
    )
    is_full = system_error is not None and system_error.errno in DISK_FULL
    is_full = is_full or any(os.strerror(code) in reasons for code in DISK_FULL)
    if is_save and not is_full:
        # torch's writer reports a full disk as "unexpected pos", and on some ranks not at all.
        is_full = shutil.disk_usage(existing_ancestor(output)).free < _FULL_BYTES
    if is_full:
        return WorkError(
            f"the disk of {output} is full: {event}",
            fix=f"free space there; {how_to_resume(output)}",
        )
    return WorkError(
        f"{event} ({reasons})",
        fix=f"check that disk and its permissions; {how_to_resume(output)}",
    )


def is_gradient_check(message: str) -> bool:
    """Return True if a `validate_result` message is about a gradient, False if about a loss."""
    return _GRADIENT_WORD in message


def is_echo(error: BaseException) -> bool:
    """Return True if an exception is the effect of another rank's failure."""
    if _is_checkpoint_error(error):
        # A failed save raises on all ranks; only the coordinator's exception holds the reasons
        # (megatron/core/dist_checkpointing/strategies/state_dict_saver.py:258, 0.19.2).
        return not getattr(error, "failures", None)
    return any(sign in str(error) for sign in _ECHOES)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its causes, and those that Megatron's save collected from the ranks."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop(0)
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        waiting += [cause.__cause__, None if cause.__suppress_context__ else cause.__context__]
        failures = getattr(cause, "failures", None)
        if isinstance(failures, Mapping):
            # torch.distributed.checkpoint.api.WRAPPED_EXCEPTION: (exception, traceback)
            waiting += [
                failure[0] if isinstance(failure, tuple) else failure
                for failure in failures.values()
            ]


def _is_checkpoint_error(error: BaseException) -> bool:
    """Return True for torch.distributed.checkpoint's CheckpointException, without loading torch."""
    return type(error).__name__ == "CheckpointException"


# ------------------------------------------------------------------------------------------------
# Around the ranks
# ------------------------------------------------------------------------------------------------


@contextmanager
def only_complete_checkpoints(root: Path) -> Iterator[None]:
    """Remove, on the way out, the checkpoints in ``root`` that were begun inside and not finished.

    Megatron writes into ``iter_*`` in place, and writes the number into its tracker once all is
    complete. So a folder with a higher number is a fragment. Folders from before stay: the tracker
    may have been set back by hand. A disk that fills up while the tracker is written leaves it
    empty, because Megatron truncates it first (megatron/training/checkpointing.py:1011, 0.19.2).
    It is then set to the newest complete checkpoint.
    """
    before = {folder.name for folder in iteration_folders(root)}
    started_from = tracked_iteration(root)
    try:
        yield
    finally:
        last = tracked_iteration(root)
        if last is None and (root / TRACKER_FILE).is_file() and not _tracks_release(root):
            finished = [
                number
                for number in _new_iterations(root, before)
                if is_complete(root / iteration_folder_name(number))
            ]
            if started_from is not None:
                finished.append(started_from)
            last = max(finished, default=None)
            _remove_newer(root, before, last)  # first: it makes the room that the tracker needs
            if last is None:
                (root / TRACKER_FILE).unlink()
            else:
                write_tracker(root, last)
        _remove_newer(root, before, last)


def _new_iterations(root: Path, before: set[str]) -> list[int]:
    numbers = [
        iteration_number(folder.name)
        for folder in iteration_folders(root)
        if folder.name not in before
    ]
    return [number for number in numbers if number is not None]


def _remove_newer(root: Path, before: set[str], last: int | None) -> None:
    for number in _new_iterations(root, before):
        if last is None or number > last:
            shutil.rmtree(root / iteration_folder_name(number), ignore_errors=True)


def _tracks_release(root: Path) -> bool:
    """Return True if the tracker names an import's weights, which have no number."""
    try:
        return (root / TRACKER_FILE).read_text(encoding="utf-8").strip() == RELEASE
    except (OSError, UnicodeDecodeError):
        return False
