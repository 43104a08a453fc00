"""Find launched jobs, and read their states and logs.

States come from Slurm. If Slurm has forgotten a job, they come from the run's own records:
``launch.json`` (`launchers.launch_record`) and ``attempts.jsonl`` (`launchers.outcome`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launchers import slurm
from launchers.job import LOGS_FOLDER
from launchers.launch_record import LAUNCH_FILE, read_launches
from launchers.outcome import reached_step, read_attempts
from launchers.slurm import JobState
from mellum2_megatron.common.errors import InputError, WorkError

POLL_SECONDS = 2.0
"""Seconds between two readings of a log that is followed."""
_STATE_OF_KIND = {
    "done": "COMPLETED",
    "early": "COMPLETED",
    "failed": "FAILED",
    "refused": "FAILED",
    "stopped": "REQUEUED",
    "ended": "CANCELLED",
}
"""Kind of an attempt's end -> state of a job that Slurm has forgotten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """State of one job, or of one task of an array.

    Attributes:
        job_id: ``12``, or ``12_3`` for a task.
        state: Slurm's state; for a forgotten job the state in the run's records, or ``UNKNOWN``.
        reason: reason for waiting, or the end of the last attempt.
        source: source of the state, ``slurm``, ``records`` or ``nobody``.
        folder: run folder; None if unknown.
        step: number of optimizer steps done; None if unknown.
        attempts: number of starts.
        nodes: nodes in Slurm's notation; empty if unknown.
        elapsed: running time since the last start, ``[D-]HH:MM:SS``; empty if unknown.
    """

    job_id: str
    state: str
    reason: str
    source: str
    folder: Path | None
    step: int | None = None
    attempts: int = 0
    nodes: str = ""
    elapsed: str = ""


def find_job(word: str) -> tuple[Path | None, str]:
    """Return the run folder and the job that ``word`` names.

    The folder is None for the number of a job that Slurm has forgotten.

    Args:
        word: run folder, or a job number of Slurm.

    Raises:
        InputError: neither of the two, a folder without a launch, or a launch on this machine.
    """
    if re.fullmatch(r"\d+(_\d+)?", word) and not Path(word).is_dir():
        # Slurm does not have the run folder, but the path of the log in it.
        logs = [state.log for state in slurm.states(word) if state.log is not None]
        in_run_folder = logs and logs[0].parent.name == LOGS_FOLDER
        return (logs[0].parent.parent if in_run_folder else None), word
    folder = Path(word).absolute()
    launches, attempts = read_launches(folder), read_attempts(folder)
    if launches and launches[-1].executor == "local":
        raise InputError(
            str(folder),
            rule="was launched on this machine",
            fix="look at its terminal, or at metrics.jsonl there",
        )
    if folder.name.isdigit():
        # A task of an array: the launch is recorded in the folder above.
        array = read_launches(folder.parent)
        if array and int(folder.name) < array[-1].tasks:
            return folder.parent, f"{array[-1].job_id}_{folder.name}"
    if launches:
        # Another job may have come after the last launch: submitted by hand, or a continuation.
        launch = launches[-1]
        newer = attempts and (
            attempts[-1].series == launch.job_id
            or datetime.fromisoformat(attempts[-1].started) > datetime.fromisoformat(launch.time)
        )
        return folder, attempts[-1].job if newer else launch.job_id
    if attempts:
        return folder, attempts[-1].job
    rule = "there is no such folder or job"
    if folder.is_dir():
        rule = "nothing was launched into it"
    raise InputError(str(folder), rule=rule, fix="give a run's folder, or a number in squeue")


def job_status(folder: Path | None, job_id: str) -> tuple[Status, ...]:
    """Return the status of a job, or of each task of an array.

    If Slurm does not answer, the run's own records do, and the reason is told.

    Args:
        folder: run folder; None if unknown.
        job_id: job number of Slurm.

    Raises:
        InputError: no Slurm on this machine.
        WorkError: Slurm does not answer, and the run folder is unknown.
    """
    why = "Slurm no longer has this job"
    try:
        states = {state.job_id: state for state in slurm.states(job_id)}
    except WorkError as error:
        if folder is None:
            raise
        states, why = {}, error.what
    wanted = list(states)
    if not wanted:
        launches = [] if folder is None else list(read_launches(folder))
        tasks = next((launch.tasks for launch in reversed(launches) if launch.job_id == job_id), 0)
        wanted = [f"{job_id}_{task}" for task in range(tasks)] or [job_id]
    return tuple(_status_of(number, states.get(number), folder, why) for number in wanted)


def require_idle(folder: Path) -> None:
    """Check that no job of this run folder waits or runs.

    Two jobs would overwrite each other's checkpoints.

    Raises:
        InputError: a job waits or runs; the message names it.
    """
    launches = [launch for launch in read_launches(folder) if launch.executor == "slurm"]
    last_jobs = [launch.job_id for launch in launches[-1:]]
    last_jobs += [attempt.job for attempt in read_attempts(folder)[-1:]]
    # Both: the last launch may still wait for its first attempt while another job runs, which was
    # submitted by hand.
    for job_id in dict.fromkeys(last_jobs):
        for state in slurm.states(job_id):
            if not state.finished:
                raise InputError(
                    f"{folder}: job {state.job_id} is {state.state}",
                    rule="a run folder has one job at a time",
                    fix=f"wait for it, `mellum2 launch cancel {state.job_id}`, "
                    "or choose another --output",
                )


def _status_of(job_id: str, state: JobState | None, folder: Path | None, why: str) -> Status:
    """Return one status, from Slurm's state or, if that is None, from the records in ``folder``.

    Args:
        job_id, state, folder: the job.
        why: reason for the records in place of Slurm's state.
    """
    number, task = slurm.job_number(job_id)
    if folder is not None and task is not None:
        folder = folder / task_folder(folder, number, task)
    attempts = () if folder is None else read_attempts(folder)
    step = None if folder is None or not folder.is_dir() else reached_step(folder)
    last = attempts[-1] if attempts else None
    end = "" if last is None or last.ended is None else last.reason
    if state is not None:
        # The last attempt's end explains a job that waits or has ended, not one that runs.
        reasons = [state.reason] if state.state == "RUNNING" else [state.reason, end]
        return Status(
            job_id=job_id,
            state=state.state,
            reason="; ".join(filter(None, reasons)),
            source="slurm",
            folder=folder,
            step=step,
            attempts=len(attempts),
            nodes=state.nodes,
            elapsed=state.elapsed,
        )
    kind = None if last is None else last.kind
    return Status(
        job_id=job_id,
        state="UNKNOWN" if kind is None else _STATE_OF_KIND[kind],
        reason="; ".join(
            filter(None, [end, why if kind is None else f"state from the run's records: {why}"])
        ),
        source="nobody" if kind is None else "records",
        folder=folder,
        step=step,
        attempts=len(attempts),
    )


def task_folder(folder: Path, job_id: str, task: int) -> str:
    """Return the folder of an array's task, below the array's folder."""
    for launch in reversed(read_launches(folder)):
        if launch.job_id == job_id and task < len(launch.task_folders):
            return launch.task_folders[task]
    return str(task)


def log_files(folder: Path, job_id: str) -> tuple[Path | None, dict[int, Path]]:
    """Return the existing logs of a job.

    Returns:
        The batch script's log or None, and the nodes' logs by the number of the node in the job.
    """
    script, nodes = None, {}
    # The name of a job may itself end in a number: match at the end of the file name.
    ending = re.compile(rf"-{job_id}(?:-node(?P<node>\d+))?\.log\Z")
    for path in (folder / LOGS_FOLDER).glob(f"*-{job_id}*.log"):
        match = ending.search(path.name)
        if match is None:
            continue
        if match["node"]:
            nodes[int(match["node"])] = path
        else:
            script = path
    return script, dict(sorted(nodes.items()))


def rank_log(folder: Path, job_id: str, rank: int | None = None) -> Path | None:
    """Return the log of a rank's node; None until it exists.

    Args:
        folder: run folder.
        job_id: job number of Slurm.
        rank: number of the rank, default the last one, which computes and prints the losses.

    Raises:
        InputError: the job has no such rank.
    """
    launches = read_launches(folder)
    nodes = log_files(folder, job_id)[1]
    if not launches:
        # Submitted by hand: nothing records the number of ranks on a node.
        return nodes[max(nodes)] if nodes else None
    launch = launches[-1]
    last = launch.nodes * launch.ranks_per_node - 1
    rank = last if rank is None else rank
    if rank > last:
        raise InputError(
            f"--rank {rank}", rule=f"the job has ranks 0 to {last}", fix=f"use one of 0 to {last}"
        )
    return nodes.get(rank // launch.ranks_per_node)


def follow(find_log: Callable[[], Path | None], ended: Callable[[], bool]) -> Iterator[str]:
    """Yield the lines of a log as they are written, until the job has ended.

    Args:
        find_log: function that returns the log; None until it exists.
        ended: function that returns True once the job has ended.
    """
    current: Path | None = None
    position = 0
    rest = ""
    while True:
        # Before reading, so that lines written just before the end are still read.
        job_ended = ended()
        log = find_log()
        if log is not None and log.is_file():
            # The log may change: without a launch record it is that of the last node with a log.
            if log != current:
                current, position = log, 0
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                text = rest + file.read()
                position = file.tell()
            *lines, rest = text.split("\n")
            yield from lines
        if job_ended:
            break
        time.sleep(POLL_SECONDS)
    if rest:
        yield rest


def has_ended(job_id: str) -> bool:
    """Return True if no task of a job waits or runs."""
    return all(state.finished for state in slurm.states(job_id))


def launched_folders(root: Path) -> Sequence[Path]:
    """Return the run folders in ``root`` with a launch, oldest first."""
    files = sorted(root.glob(f"*/{LAUNCH_FILE}"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in files]
