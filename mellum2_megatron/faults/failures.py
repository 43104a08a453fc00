"""A run that fails says why in one message and leaves nothing half-written.

Ranks do not print what ended them: several fail at once, most of them only because another one did.
Each leaves a report (`report_failure`) in the file that torch's elastic agent names for it, and the
launcher prints the one that tells most (`launchers.local`). A rank that no launcher of ours started
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
"""Set for every rank by torch's elastic agent
(torch/distributed/elastic/agent/server/local_elastic_agent.py, 2.15)."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Kind = Literal["explained", "unexpected", "echo"]

# What a rank meets when another one is gone (gloo, NCCL, TCPStore), and a failed save on all ranks
# but the first (megatron/core/dist_checkpointing/strategies/state_dict_saver.py:258, 0.19.2: only
# the coordinator gets details).
_ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "recvValue failed",
)
_LAST_LINES = 12
_GRACE_SECONDS = 25  # a little less than the agent's 30
_FULL_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFailure:
    """How one rank ended.

    Attributes:
        rank: its number.
        exit_code: of the process; minus the signal's number if a signal ended it.
        kind: "explained" has a message for the user; "echo" is the effect of another rank's
            failure.
        message: one line or a few, without traceback; empty if the process left no report.
        traceback: empty if the process left no report.
        ended: when, in seconds since the epoch.
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

    def error(self, traceback_file: Path | None) -> Mellum2Error:
        """Return the error to show: the rank's own message, or which rank died of what."""
        if self.kind == "explained":
            return RankError(self.message, exit_code=self.exit_code)
        if self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            return WorkError(
                f"rank {self.rank} was ended by {name}",
                fix="if nobody sent it, the machine ran out of memory (see dmesg): lower schedule.micro_batch_size; "
                "the same command resumes from the last checkpoint",
            )
        last = "\n".join(self.message.strip().splitlines()[-_LAST_LINES:]) or "it left no message"
        where = (
            f"the whole traceback is in {traceback_file}"
            if traceback_file
            else "run with --verbose for more"
        )
        return WorkError(
            f"rank {self.rank} failed with exit code {self.exit_code}: {last}",
            fix=f"{where}; the same command resumes from the last checkpoint",
        )


class RankError(Mellum2Error):
    """A rank's own complete message, and the exit code that it calls for."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def root_cause(failures: list[RankFailure]) -> RankFailure:
    """Return the failure that caused the others: an explained one, then a signal, then what is no
    echo.

    SIGTERM comes last: the agent ends the other ranks with it, and with SIGKILL those that are
    still there 30 s later (torch/distributed/elastic/multiprocessing/api.py:1023, 2.15).
    """
    begin = min(failure.ended for failure in failures)

    def order(failure: RankFailure) -> tuple[int, int]:
        if failure.kind == "explained":
            return 0, failure.rank
        if failure.exit_code < 0:
            late = failure.exit_code == -signal.SIGKILL and failure.ended - begin >= _GRACE_SECONDS
            return (4 if late or failure.exit_code == -signal.SIGTERM else 1), failure.rank
        return (3 if failure.kind == "echo" else 2), failure.rank

    return min(failures, key=order)


# ---------------------------------------------------------------------------------------------------------------------
# In a rank
# ---------------------------------------------------------------------------------------------------------------------


def report_failure(error: BaseException, *, to_launcher: bool, verbose: bool) -> int:
    """Tell why this rank ends; call it while the exception is being handled.

    Args:
        error: what ended it.
        to_launcher: a launcher of ours collects the reports; otherwise the message goes to stderr.
        verbose: print the traceback too.

    Returns:
        Exit code of the process: 2 for bad input, else 1.
    """
    kind: Kind = (
        "explained"
        if isinstance(error, Mellum2Error)
        else "echo"
        if is_echo(error)
        else "unexpected"
    )
    message = str(error) if kind == "explained" else f"{type(error).__name__}: {error}"
    # str(int()): torch reads both this way
    # (torch/distributed/elastic/multiprocessing/errors/__init__.py, 2.15).
    extra = {
        "py_callstack": traceback.format_exc(),
        "timestamp": str(int(time.time())),
        "kind": kind,
    }
    file = os.environ.get(ERROR_FILE_VARIABLE) if to_launcher else None
    written = False
    if file:
        with suppress(OSError):
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
    """Turn what ends a run into a `WorkError` where it is not ours to debug.

    That is what the system refused (`OSError`), and a checkpoint that could not be written:
    Megatron collects the ranks' exceptions, which lose their causes on the way, in a
    `CheckpointException`.

    Args:
        output: folder of the run. What a failed save has written must still be there: it fills the
            disk.

    Raises:
        WorkError: with the reason and what to do.
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
    not_finite = next((found for cause in causes if (found := _NOT_FINITE.match(str(cause)))), None)
    if not_finite is not None:
        return _not_finite(not_finite)
    system = next((cause for cause in causes if isinstance(cause, OSError)), None)
    saving = _is_checkpoint_error(error) and error.args[0] == "write"
    if is_echo(error) or (system is None and not saving):
        return None
    what = "a checkpoint could not be written" if saving else "the run stopped"
    reasons = "; ".join(
        dict.fromkeys(first_line(cause) for cause in causes if not _is_checkpoint_error(cause))
    )
    full = system is not None and system.errno in DISK_FULL
    if (
        full
        or any(os.strerror(code) in reasons for code in DISK_FULL)
        or (saving and _is_full(output))
    ):
        return WorkError(
            f"the disk of {output} is full: {what}",
            fix="free space there and give the same command again, which resumes from the last complete checkpoint",
        )
    fix = "check that disk and its permissions; the same command resumes from the last complete checkpoint"
    return WorkError(f"{what} ({reasons})", fix=fix)


# RerunStateMachine.validate_result (megatron/core/rerun_state_machine.py:528, 0.19.2), asked about
# each micro-batch's loss (train.sum_loss) and each bucket's gradient norm
# (core/distributed/param_and_grad_buffer.py:339).
_NOT_FINITE = re.compile(
    r"Rank (\d+), .*iteration (\d+): Unexpected result (.*) \(message='(.*)'\)", re.DOTALL
)


def _not_finite(found: re.Match[str]) -> WorkError:
    rank, iteration, value, message = found.groups()
    kind = "gradient" if is_gradient_check(message) else "loss"
    number = re.search(r"-?(inf|nan)", value)
    # The machine counts a step when it begins (:303), and its message adds one more.
    return WorkError(
        f"the {kind} is {number.group() if number else value} on rank {rank} at "
        f"step {int(iteration) - 1}; nothing was saved after it",
        fix="look at the metrics before that step; resume from an earlier checkpoint with a lower "
        "optimizer.lr or a smaller optimizer.clip_grad",
    )


_GRADIENT_WORD = "grad"
"""Part of each message of Megatron's checks on gradients, as in "found NaN in local grad norm for
bucket #0" (core/distributed/param_and_grad_buffer.py:349-369, 0.19.2); not of
`training.step.LOSS_CHECK`."""


def is_gradient_check(message: str) -> bool:
    """Return True if a `validate_result` message is about a gradient, False if about a loss."""
    return _GRADIENT_WORD in message


def is_echo(error: BaseException) -> bool:
    """Whether an exception is the effect of another rank's failure."""
    if _is_checkpoint_error(error):
        return not getattr(error, "failures", None)
    return any(sign in str(error) for sign in _ECHOES)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, what it was raised from, and what Megatron's save collected from the
    ranks."""
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
    """Whether it is torch.distributed.checkpoint's CheckpointException; importing that takes
    torch."""
    return type(error).__name__ == "CheckpointException"


def _is_full(output: Path) -> bool:
    """Whether a failed save met a full disk: torch's writer says "unexpected pos", and on some
    ranks nothing at all."""
    return shutil.disk_usage(existing_ancestor(output)).free < _FULL_BYTES


# ---------------------------------------------------------------------------------------------------------------------
# Around the ranks
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def only_complete_checkpoints(root: Path) -> Iterator[None]:
    """Remove, on the way out, the checkpoints of ``root`` that were begun inside and not finished.

    Megatron writes into ``iter_*`` in place and names the folder in its tracker once it is
    complete; a newer folder than that is therefore a fragment. Those that were there before are
    left alone: someone may have set the tracker back. A tracker that was cut off when the disk
    filled up (Megatron truncates it first, megatron/training/checkpointing.py:1011, 0.19.2) names
    the newest complete checkpoint again.
    """
    before = {folder.name for folder in iteration_folders(root)}
    started_from = tracked_iteration(root)
    try:
        yield
    finally:
        last = tracked_iteration(root)
        if last is None and (root / TRACKER_FILE).is_file() and not _is_release(root):
            finished = [
                number
                for number in _new(root, before)
                if is_complete(root / iteration_folder_name(number))
            ]
            last = max([*finished, *([] if started_from is None else [started_from])], default=None)
            _remove_newer(root, before, last)  # first: it makes the room that the tracker needs
            if last is None:
                (root / TRACKER_FILE).unlink()
            else:
                write_tracker(root, last)
        _remove_newer(root, before, last)


def _new(root: Path, before: set[str]) -> list[int]:
    numbers = [
        iteration_number(folder.name)
        for folder in iteration_folders(root)
        if folder.name not in before
    ]
    return [number for number in numbers if number is not None]


def _remove_newer(root: Path, before: set[str], last: int | None) -> None:
    for number in _new(root, before):
        if last is None or number > last:
            shutil.rmtree(root / iteration_folder_name(number), ignore_errors=True)


def _is_release(root: Path) -> bool:
    try:
        return (root / TRACKER_FILE).read_text(encoding="utf-8").strip() == RELEASE
    except (OSError, UnicodeDecodeError):
        return False
