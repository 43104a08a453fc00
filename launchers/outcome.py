"""How a job's attempts ended, and what happens next: go on, try again, or stop for good.

A job that is requeued keeps its number and its run folder. Each start of it is an attempt, with a
line in ``attempts.jsonl`` when it begins and one when it ends::

    {"event": "begin", "job": "17", "restart": 0, "series": "17",
     "time": "2026-11-22T10:00:00+00:00", "step": 0}
    {"event": "end", "job": "17", "restart": 0, "time": "..", "step": 40, "code": 75,
     "kind": "stopped", "reason": ".."}

The batch script asks ``python -m launchers.outcome`` when an attempt has not ended well; its exit
code is 0 if the job is to be started again, else the exit code of the job.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mellum2_megatron.checkpoint.folder import tracked_iteration
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json
from mellum2_megatron.faults.failures import RankFailure, root_cause
from mellum2_megatron.faults.stop_request import STOPPED
from mellum2_megatron.metrics.log import METRICS_FILE

logger = logging.getLogger(__name__)

ATTEMPTS_FILE = "attempts.jsonl"
REPORTS_FOLDER = "attempts"
SERIES_VARIABLE = "MELLUM2_SERIES"
"""Job that a continuation continues, where jobs cannot be requeued."""

Kind = Literal["done", "stopped", "failed", "refused", "ended"]
"""``stopped`` has saved as it was told; ``refused`` is bad input; ``ended`` was ended by Slurm."""

_TAIL_BYTES = 1 << 16
_REASON_LENGTH = 600
# Of processes that a stop signal met before they listened.
_SIGNALLED = tuple(128 + each for each in (signal.SIGTERM, signal.SIGUSR1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of a job.

    Attributes:
        job: Slurm's number.
        restart: how often that job had been requeued.
        series: first job of those that continue each other.
        began, ended: ISO 8601, UTC; ``ended`` is None while it runs, and after the machine has
            failed.
        begin_step: optimizer steps done at its begin.
        step: those done at its end.
        code: exit code, None while it runs.
        kind, reason: how it ended.
    """

    job: str
    restart: int
    series: str
    began: str
    begin_step: int
    ended: str | None = None
    step: int | None = None
    code: int | None = None
    kind: Kind | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """How a node's ranks ended, as its agent tells it: exit code, and what failed."""

    node: str
    code: int
    failures: tuple[RankFailure, ...] = ()
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What follows from an attempt's end.

    Attributes:
        again: start the job again.
        code: of the job, if not.
        kind, reason: for the record.
        message: for the log.
    """

    again: bool
    code: int
    kind: Kind
    reason: str
    message: str


def read_attempts(folder: Path) -> tuple[Attempt, ...]:
    """Return the attempts of a run, oldest first. Lines that a killed process has left unfinished
    are skipped."""
    path = folder / ATTEMPTS_FILE
    if not path.is_file():
        return ()
    found: dict[tuple[str, int], Attempt] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event: dict[str, Any] = json.loads(line)
            key = str(event["job"]), int(event["restart"])
            if event["event"] == "begin":
                found[key] = Attempt(
                    job=key[0],
                    restart=key[1],
                    series=str(event["series"]),
                    began=str(event["time"]),
                    begin_step=int(event["step"]),
                )
            elif key in found:
                found[key] = dataclasses.replace(
                    found[key],
                    ended=str(event["time"]),
                    step=int(event["step"]),
                    code=int(event["code"]),
                    kind=event["kind"],
                    reason=str(event["reason"]),
                )
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: %r is no record of an attempt", path, line[:200])
    return tuple(found.values())


def reached_step(folder: Path) -> int:
    """Return the last optimizer step that a run's metrics or its newest checkpoint know of."""
    steps = [tracked_iteration(folder) or 0]
    try:
        with (folder / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        lines = []
    for line in reversed(lines):
        try:
            steps.append(int(json.loads(line)["step"]))
            break
        except (ValueError, KeyError, TypeError):
            continue
    return max(steps)


def failures_in_place(attempts: Sequence[Attempt]) -> int:
    """Return how many of the attempts have failed since one of them last got further than all
    before it.

    Told to stop or preempted is no failure. An attempt without an end was on a machine that failed.
    """
    furthest, count = -1, 0
    for attempt in attempts:
        reached = attempt.begin_step if attempt.step is None else attempt.step
        if reached > furthest:
            furthest, count = reached, 0
        count += attempt.kind in (None, "failed", "refused")
    return count


def judge(code: int, reports: Sequence[Report], told: str) -> tuple[Kind, int, str]:
    """Return how an attempt ended, with its exit code and why.

    Args:
        code: of the step (srun): the highest of its nodes'.
        reports: of the nodes; one whose agent was killed has left none.
        told: signal that reached the batch script, "" for none.
    """
    if code == 0:
        return "done", 0, "the run has ended"
    refusal = next((report for report in reports if report.code == InputError.exit_code), None)
    if refusal is not None:
        return "refused", refusal.code, refusal.message
    if told == "TERM":
        return "ended", STOPPED, "Slurm ended the job (cancelled, preempted or out of time)"
    # Ranks leave with 75 only after all have saved: what kept another node's agent from saying so
    # matters no more.
    silent = (STOPPED, *_SIGNALLED) if told else (STOPPED,)
    if all(report.code in (0, STOPPED) for report in reports) if reports else code in silent:
        return "stopped", STOPPED, "told to stop, all is saved"
    failures = {
        failure.rank: (report.node, failure) for report in reports for failure in report.failures
    }
    if failures:
        cause = root_cause([failure for _, failure in failures.values()])
        error = cause.error(None)
        return "failed", error.exit_code, f"node {failures[cause.rank][0]}: {error}"
    told_by = next((report for report in reports if report.code not in (0, STOPPED)), None)
    if told_by is not None:
        return "failed", 1, f"node {told_by.node}: {told_by.message}"
    return (
        "failed",
        1,
        f"the step ended with exit code {code}, and no node said why; see the log of each node",
    )


def decide(attempts: Sequence[Attempt], *, tries: int) -> Decision:
    """Return what follows from the last of the attempts, which has ended.

    Args:
        attempts: of a run, oldest first.
        tries: how often a job that fails is started again without a new step.
    """
    last = attempts[-1]
    assert last.kind is not None
    assert last.code is not None
    step = last.step or 0
    again, code = False, last.code
    if last.kind == "done":
        message = f"done at step {step}"
    elif last.kind == "refused":
        message = f"{last.reason}\nnot started again: the same would be refused again"
    elif last.kind == "ended":
        message = (
            f"{last.reason}; step {step} was reached. A preempted job is requeued by Slurm itself"
        )
    elif last.kind == "stopped":
        again, message = (
            True,
            f"{last.reason}; the job goes on from step {step} when Slurm starts it again",
        )
    else:
        count = failures_in_place([each for each in attempts if each.series == last.series])
        again = count <= tries
        where = f"step {step} has not been passed in {count} start{'s' * (count != 1)}"
        then = (
            f"starting again, {count} of {tries} tries"
            if again
            else "not started again (tries in the profile)"
        )
        message = f"{last.reason}\n{where}: {then}"
    return Decision(again=again, code=code, kind=last.kind, reason=last.reason, message=message)


# ---------------------------------------------------------------------------------------------------------------------
# In a job
# ---------------------------------------------------------------------------------------------------------------------


def this_attempt() -> tuple[str, int]:
    """Return the job's number and how often it has been requeued, as Slurm's environment has
    them."""
    return os.environ.get("SLURM_JOB_ID", "0"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def begin(folder: Path, *, tries: int) -> Decision | None:
    """Record that an attempt of this job begins; return a decision against it if it must not.

    An attempt before it that has no end (its machine failed, or Slurm killed it) gets one.
    """
    job, restart = this_attempt()
    series = os.environ.get(SERIES_VARIABLE, job)
    earlier = [each for each in read_attempts(folder) if each.series == series]
    step = reached_step(folder)
    if earlier and earlier[-1].ended is None:
        attempt = earlier[-1]
        reports = read_reports(folder, attempt.job, attempt.restart)
        stopped = reports and all(report.code == STOPPED for report in reports)
        kind: Kind = "stopped" if stopped else "failed"
        reason = (
            "preempted after a save"
            if stopped
            else "it ended without a word: a node failed, or Slurm killed it"
        )
        _record_end(
            folder, attempt.job, attempt.restart, step, STOPPED if stopped else 1, kind, reason
        )
        earlier = [each for each in read_attempts(folder) if each.series == series]
    decision = decide(earlier, tries=tries) if earlier else None
    _append(
        folder,
        {
            "event": "begin",
            "job": job,
            "restart": restart,
            "series": series,
            "time": _now(),
            "step": step,
        },
    )
    return (
        decision
        if decision is not None and decision.kind == "failed" and not decision.again
        else None
    )


def end(folder: Path, *, code: int, told: str = "", tries: int) -> Decision:
    """Record how this job's attempt ended, and return what follows."""
    job, restart = this_attempt()
    attempts = read_attempts(folder)
    if not any((each.job, each.restart) == (job, restart) for each in attempts):
        # Not even node 0's agent came to begin it.
        _append(
            folder,
            {
                "event": "begin",
                "job": job,
                "restart": restart,
                "series": os.environ.get(SERIES_VARIABLE, job),
            }
            | {"time": _now(), "step": reached_step(folder)},
        )
    kind, code, reason = judge(code, read_reports(folder, job, restart), told)
    if (
        len(reason) > _REASON_LENGTH
    ):  # torch's exceptions can be pages; the node's log has all of it
        reason = f"{reason[: _REASON_LENGTH // 2]} .. {reason[-_REASON_LENGTH // 2 :]}"
    _record_end(folder, job, restart, reached_step(folder), code, kind, reason)
    attempts = read_attempts(folder)
    return decide([*attempts[: _index(attempts, job, restart) + 1]], tries=tries)


def write_report(folder: Path, node: int, report: Report) -> None:
    """Leave what this node's agent has to say for `end`."""
    failures = [dataclasses.asdict(failure) for failure in report.failures]
    write_json(
        _reports(folder, *this_attempt()) / f"{node}.json",
        {"node": report.node, "code": report.code, "failures": failures, "message": report.message},
    )


def read_reports(folder: Path, job: str, restart: int) -> list[Report]:
    """Return what the nodes' agents have said of an attempt, in the order of the nodes."""
    found = []
    for path in sorted(
        _reports(folder, job, restart).glob("*.json"), key=lambda path: int(path.stem)
    ):
        value: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        failures = tuple(RankFailure(**failure) for failure in value["failures"])
        found.append(
            Report(
                node=value["node"], code=value["code"], failures=failures, message=value["message"]
            )
        )
    return found


def _reports(folder: Path, job: str, restart: int) -> Path:
    return folder / REPORTS_FOLDER / f"{job}.{restart}"


def _index(attempts: Sequence[Attempt], job: str, restart: int) -> int:
    return next(
        number for number, each in enumerate(attempts) if (each.job, each.restart) == (job, restart)
    )


def _record_end(
    folder: Path, job: str, restart: int, step: int, code: int, kind: Kind, reason: str
) -> None:
    value = {"event": "end", "job": job, "restart": restart, "time": _now(), "step": step}
    _append(folder, {**value, "code": code, "kind": kind, "reason": reason})


def _append(folder: Path, value: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ATTEMPTS_FILE).open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        unfinished = b"\n" if size and file.read(1) != b"\n" else b""
        file.write(unfinished + json.dumps(value).encode() + b"\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def main(argv: Sequence[str] | None = None) -> int:
    """Say what a job does after an attempt that has not ended well.

    Returns:
        0 if it is to be started again, else its exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m launchers.outcome", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument(
        "--code", type=int, required=True, help="exit code of the step that ran the ranks"
    )
    parser.add_argument("--told", default="", help="signal that reached the batch script")
    parser.add_argument(
        "--tries", type=int, required=True, help="how often to start again without a new step"
    )
    options = parser.parse_args(argv)
    decision = end(options.folder, code=options.code, told=options.told, tries=options.tries)
    sys.stderr.write(f"mellum2: {decision.message}\n")
    return 0 if decision.again else decision.code or 1


if __name__ == "__main__":
    sys.exit(main())
