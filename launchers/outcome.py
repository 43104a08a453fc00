"""Decide what follows when a job's attempt has ended: restart it or stop for good.

A requeued job keeps its number and its run folder. Each of its starts is an attempt, with one line
in ``attempts.jsonl`` for the start and one for the end::

    {"event": "begin", "job": "17", "restart": 0, "series": "17",
     "time": "2026-11-22T10:00:00+00:00", "step": 0}
    {"event": "end", "job": "17", "restart": 0, "time": "..", "step": 40,
     "code": 75, "kind": "stopped", "reason": ".."}

A cluster that forbids requeueing gets a new job instead. It belongs to the same ``series``, which
has the number of the first job.

Node 0's agent writes the first line (`start_attempt`). After an attempt that has not ended well the
batch script runs ``python -m launchers.outcome``. Its exit code is 0 to restart the job, else the
exit code of the job. Scripts in run folders call this module by its name.
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

from launchers.early_end import ended_early
from mellum2_megatron.checkpoint.folder import tracked_iteration
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import read_bytes, write_json
from mellum2_megatron.common.json_files import load_json, parse_object
from mellum2_megatron.faults.failures import RankFailure, root_cause
from mellum2_megatron.faults.stop_request import STOPPED
from mellum2_megatron.metrics.log import METRICS_FILE

logger = logging.getLogger(__name__)

ATTEMPTS_FILE = "attempts.jsonl"
REPORTS_FOLDER = "attempts"
SERIES_VARIABLE = "MELLUM2_SERIES"
"""Environment variable with the number of a series' first job; the batch script sets it."""

Kind = Literal["done", "early", "stopped", "failed", "refused", "ended"]
"""``early``: ended by a limit of its loss; ``stopped``: saved after a stop signal; ``refused``: bad
input; ``ended``: ended by Slurm."""

_PREEMPTED = "preempted after a save"
_CUT_OFF = "it ended without a report: a node failed, or Slurm killed it"

_TAIL_BYTES = 1 << 16
"""Bytes at the end of metrics.jsonl that are read for its last row."""
_REASON_LENGTH = 600
"""Most characters of a reason on record."""
_SIGNALLED = tuple(128 + number for number in (signal.SIGTERM, signal.SIGUSR1))
"""Exit codes of processes killed by a stop signal before installing their handler."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of a job.

    Attributes:
        job: Slurm's job number.
        restart: number of requeues before this attempt.
        series: number of the first job of the series.
        started: start time, ISO 8601, UTC.
        start_step: number of optimizer steps done at the start.
        ended: end time, ISO 8601, UTC; None while it runs, and if its machine failed.
        step: number of optimizer steps done at the end; None without an end.
        code: exit code; None without an end.
        kind: kind of end; None without an end.
        reason: cause of the end in words; empty without an end.
    """

    job: str
    restart: int
    series: str
    started: str
    start_step: int
    ended: str | None = None
    step: int | None = None
    code: int | None = None
    kind: Kind | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """End of one node's ranks, as reported by its agent.

    Attributes:
        node: name of the node.
        code: exit code of the agent.
        failures: failures of its ranks, default none.
        message: one message for all of them; empty after a stop.
    """

    node: str
    code: int
    failures: tuple[RankFailure, ...] = ()
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Consequence of an attempt's end.

    Attributes:
        restart: start the job again.
        exit_code: exit code of the job otherwise.
        kind: kind of the attempt's end.
        reason: cause of the end in words.
        message: text for the log.
    """

    restart: bool
    exit_code: int
    kind: Kind
    reason: str
    message: str


def read_attempts(folder: Path) -> tuple[Attempt, ...]:
    """Return the attempts of a run, oldest first, without half-written lines."""
    path = folder / ATTEMPTS_FILE
    if not path.is_file():
        return ()
    attempts: dict[tuple[str, int], Attempt] = {}
    for line in read_bytes(path).decode("utf-8", errors="replace").splitlines():
        try:
            event = parse_object(line)
            key = str(event["job"]), int(event["restart"])
            if event["event"] == "begin":
                attempts[key] = Attempt(
                    job=key[0],
                    restart=key[1],
                    series=str(event["series"]),
                    started=str(event["time"]),
                    start_step=int(event["step"]),
                )
            elif key in attempts:
                attempts[key] = dataclasses.replace(
                    attempts[key],
                    ended=str(event["time"]),
                    step=int(event["step"]),
                    code=int(event["code"]),
                    kind=event["kind"],
                    reason=str(event["reason"]),
                )
        except (ValueError, KeyError, TypeError):
            # A killed process can leave half a line; the lines around it are complete.
            logger.warning("%s: %r is no record of an attempt", path, line[:200])
    return tuple(attempts.values())


def reached_step(folder: Path) -> int:
    """Return the last optimizer step in a run's metrics or its newest checkpoint; 0 without one."""
    steps = [tracked_iteration(folder) or 0]
    try:
        with (folder / METRICS_FILE).open("rb") as file:
            # metrics.jsonl of a long run is large; its last row is within the tail.
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            # The last element is empty, or a line that is just being written.
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        lines = []
    for line in reversed(lines):
        try:
            steps.append(int(parse_object(line)["step"]))
            break
        except (ValueError, KeyError, TypeError):
            continue
    return max(steps)


def failures_in_place(attempts: Sequence[Attempt]) -> int:
    """Return the number of failures since an attempt last passed the furthest step so far.

    Stops and preemptions do not count.
    """
    # Every new furthest step resets the count; -1, so that the first attempt resets it too.
    furthest, count = -1, 0
    for attempt in attempts:
        reached = attempt.start_step if attempt.step is None else attempt.step
        if reached > furthest:
            furthest, count = reached, 0
        # None: without a recorded end its machine failed.
        count += attempt.kind in (None, "failed", "refused")
    return count


def judge(code: int, reports: Sequence[Report], stop_signal: str) -> tuple[Kind, int, str]:
    """Return an attempt's kind of end, exit code and reason.

    Args:
        code: exit code of the step (srun), the highest of its nodes.
        reports: reports of the nodes. A killed agent leaves none.
        stop_signal: signal that reached the batch script, TERM or USR1; empty without one.
    """
    if code == 0:
        return "done", 0, "the run has ended"
    # One node's refusal is enough: all of them read the same run file and the same data.
    refusal = next((report for report in reports if report.code == InputError.exit_code), None)
    if refusal is not None:
        return "refused", refusal.code, f"node {refusal.node}: {refusal.message}"
    # After TERM Slurm itself decides whether to requeue the job. USR1 comes before the time limit,
    # and then the batch script requeues it.
    if stop_signal == "TERM":
        return "ended", STOPPED, "Slurm ended the job (cancelled, preempted or out of time)"
    if reports:
        # Ranks leave with 75 only after all have saved: an agent killed before its report does not
        # matter.
        stopped = all(report.code in (0, STOPPED) for report in reports)
    else:
        stopped = code == STOPPED or (stop_signal != "" and code in _SIGNALLED)
    if stopped:
        return "stopped", STOPPED, "stopped by a signal, all is saved"
    failures = {
        failure.rank: (report.node, failure) for report in reports for failure in report.failures
    }
    if failures:
        cause = root_cause([failure for _, failure in failures.values()])
        error = cause.error(None, None)
        return "failed", error.exit_code, f"node {failures[cause.rank][0]}: {error}"
    # An agent can fail before its ranks start, for example if the nodes did not meet.
    failed = next((report for report in reports if report.code not in (0, STOPPED)), None)
    if failed is not None:
        return "failed", 1, f"node {failed.node}: {failed.message}"
    return (
        "failed",
        1,
        f"the step ended with exit code {code}, and no node reported why; see the log of each node",
    )


def decide(attempts: Sequence[Attempt], *, tries: int) -> Decision:
    """Return the consequence of the last attempt's end.

    Args:
        attempts: attempts of a run, oldest first; the last has ended.
        tries: restarts allowed without progress.
    """
    last = attempts[-1]
    assert last.kind is not None
    assert last.code is not None
    step = last.step or 0
    restart = False
    if last.kind == "done":
        message = f"done at step {step}"
    elif last.kind == "early":
        message = f"ended at step {step}, {last.reason}"
    elif last.kind == "refused":
        message = f"{last.reason}\nnot started again: the same would be refused again"
    elif last.kind == "ended":
        message = (
            f"{last.reason}; step {step} was reached. A preempted job is requeued by Slurm itself"
        )
    elif last.kind == "stopped":
        restart = True
        message = f"{last.reason}; the job resumes from step {step} when Slurm starts it again"
    else:
        # A newly submitted job is a new series: its failures count from zero.
        series = [attempt for attempt in attempts if attempt.series == last.series]
        count = failures_in_place(series)
        restart = count <= tries
        if restart:
            consequence = f"starting again, {count} of {tries} tries"
        else:
            consequence = "not started again (tries in the profile)"
        starts = "start" if count == 1 else "starts"
        message = (
            f"{last.reason}\nstep {step} has not been passed in {count} {starts}: {consequence}"
        )
    return Decision(
        restart=restart,
        exit_code=last.code,
        kind=last.kind,
        reason=last.reason,
        message=message,
    )


# ------------------------------------------------------------------------------
# In a job
# ------------------------------------------------------------------------------


def this_attempt() -> tuple[str, int]:
    """Return Slurm's job number and the number of requeues so far, from the environment."""
    return os.environ.get("SLURM_JOB_ID", "0"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def start_attempt(folder: Path, *, tries: int) -> Decision | None:
    """Record the start of this job's attempt.

    The preceding attempt gets its end first, if none is on record.

    Returns:
        The decision not to run, if the preceding attempts failed too often; None to run.
    """
    job, restart = this_attempt()
    series = os.environ.get(SERIES_VARIABLE, job)
    earlier = _of_series(folder, series)
    if earlier and earlier[-1].ended is None:
        # Its machine failed, or Slurm killed the batch script. The agents may have reported a save
        # before that.
        cut_off = earlier[-1]
        reports = read_reports(folder, cut_off.job, cut_off.restart)
        if reports and all(report.code == STOPPED for report in reports):
            _record_end(folder, cut_off.job, cut_off.restart, STOPPED, "stopped", _PREEMPTED)
        else:
            _record_end(folder, cut_off.job, cut_off.restart, 1, "failed", _CUT_OFF)
        earlier = _of_series(folder, series)
    decision = decide(earlier, tries=tries) if earlier else None
    _record_start(folder, job, restart)
    # Slurm may requeue a job after any end; only repeated failure keeps it from running.
    if decision is not None and decision.kind == "failed" and not decision.restart:
        return decision
    return None


def finish_attempt(folder: Path, *, code: int, stop_signal: str = "", tries: int) -> Decision:
    """Record the end of this job's attempt and return its consequence.

    Args:
        folder: run folder.
        code: exit code of the step that ran the ranks.
        stop_signal: signal that reached the batch script, TERM or USR1; empty without one.
        tries: restarts allowed without progress.
    """
    attempt = job, restart = this_attempt()
    if attempt not in [(earlier.job, earlier.restart) for earlier in read_attempts(folder)]:
        # Node 0's agent died before it could record the start.
        _record_start(folder, job, restart)
    kind, code, reason = judge(code, read_reports(folder, job, restart), stop_signal)
    if early := ended_early(folder):
        kind, code, reason = "early", 0, early
    if len(reason) > _REASON_LENGTH:
        # torch's exceptions can fill pages; the node's log has the full text.
        reason = f"{reason[: _REASON_LENGTH // 2]} .. {reason[-_REASON_LENGTH // 2 :]}"
    _record_end(folder, job, restart, code, kind, reason)
    attempts = read_attempts(folder)
    # A continuation may have added attempts after this one meanwhile.
    last = [(recorded.job, recorded.restart) for recorded in attempts].index(attempt)
    return decide(attempts[: last + 1], tries=tries)


def write_report(folder: Path, node: int, report: Report) -> None:
    """Write a node's report on this attempt, for `finish_attempt`."""
    write_json(_reports(folder, *this_attempt()) / f"{node}.json", dataclasses.asdict(report))


def read_reports(folder: Path, job: str, restart: int) -> list[Report]:
    """Return the nodes' reports on an attempt, in the order of the nodes."""
    files = _reports(folder, job, restart).glob("*.json")
    reports = []
    for path in sorted(files, key=lambda path: int(path.stem)):
        value = load_json(path)
        failures = tuple(RankFailure(**failure) for failure in value["failures"])
        reports.append(
            Report(
                node=value["node"], code=value["code"], failures=failures, message=value["message"]
            )
        )
    return reports


def _reports(folder: Path, job: str, restart: int) -> Path:
    return folder / REPORTS_FOLDER / f"{job}.{restart}"


def _of_series(folder: Path, series: str) -> list[Attempt]:
    return [attempt for attempt in read_attempts(folder) if attempt.series == series]


def _record_start(folder: Path, job: str, restart: int) -> None:
    event = {
        "event": "begin",
        "job": job,
        "restart": restart,
        "series": os.environ.get(SERIES_VARIABLE, job),
        "time": _now(),
        "step": reached_step(folder),
    }
    _append(folder, event)


def _record_end(folder: Path, job: str, restart: int, code: int, kind: Kind, reason: str) -> None:
    event = {
        "event": "end",
        "job": job,
        "restart": restart,
        "time": _now(),
        "step": reached_step(folder),
        "code": code,
        "kind": kind,
        "reason": reason,
    }
    _append(folder, event)


def _append(folder: Path, event: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ATTEMPTS_FILE).open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        # A killed process may have left half a line, which must not swallow this event.
        unfinished = b"\n" if size and file.read(1) != b"\n" else b""
        file.write(unfinished + json.dumps(event).encode() + b"\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def main(argv: Sequence[str] | None = None) -> int:
    """Decide whether the job starts again after an attempt that has not ended well.

    Returns:
        0 to restart the job, else the job's exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m launchers.outcome", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument(
        "--code", type=int, required=True, help="exit code of the step that ran the ranks"
    )
    parser.add_argument("--told", default="", help="signal that reached the batch script")
    parser.add_argument(
        "--tries", type=int, required=True, help="restarts allowed without progress"
    )
    options = parser.parse_args(argv)
    decision = finish_attempt(
        options.folder, code=options.code, stop_signal=options.told, tries=options.tries
    )
    sys.stderr.write(f"mellum2: {decision.message}\n")
    # Not 0 without a restart: the batch script would requeue the job.
    return 0 if decision.restart else decision.exit_code or 1


if __name__ == "__main__":
    sys.exit(main())
