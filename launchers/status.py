"""What became of a launch: states and logs. Slurm is asked, and the run's own records where it has
forgotten."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launchers import slurm
from launchers.job import LOGS_FOLDER
from launchers.launch_record import LAUNCH_FILE, Launch, read_launches
from launchers.outcome import ATTEMPTS_FILE, Attempt, reached_step, read_attempts
from launchers.slurm import JobState
from mellum2_megatron.common.errors import InputError

POLL_SECONDS = 2.0
_GONE = {
    "done": "COMPLETED",
    "failed": "FAILED",
    "refused": "FAILED",
    "stopped": "REQUEUED",
    "ended": "CANCELLED",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """One job, or one task of an array, as far as anybody knows.

    Attributes:
        job_id: ``12`` or ``12_3``.
        state: Slurm's word; of a job that it has forgotten, what the run's records say
            (``source``).
        reason: why it waits, or how its last attempt ended.
        source: ``slurm``, ``records`` or ``nobody``.
        folder: of the run, if known.
        step: optimizer steps done.
        attempts: how often it was started.
        nodes, elapsed: where and for how long.
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


def find(word: str) -> tuple[Path | None, str]:
    """Return the run folder and the job that ``word`` names: a folder, or a number of Slurm.

    Raises:
        InputError: it is neither, nothing was launched from that folder, or it ran on this machine.
    """
    if not re.fullmatch(r"\d+(_\d+)?", word) or Path(word).is_dir():
        return _of_folder(Path(word))
    found = slurm.states(word)
    log = next((state.log for state in found if state.log is not None), None)
    folder = None if log is None or log.parent.name != LOGS_FOLDER else log.parent.parent
    return folder, word


def _of_folder(folder: Path) -> tuple[Path, str]:
    folder = folder.absolute()
    launches, attempts = read_launches(folder), read_attempts(folder)
    task = _task_of_array(folder)
    if launches and launches[-1].executor == "local":
        raise InputError(
            str(folder),
            rule="was launched on this machine",
            fix="look at its terminal, or at metrics.jsonl there",
        )
    if task is not None:
        return task
    if attempts and (not launches or _later(attempts[-1], launches[-1])):
        return folder, attempts[-1].job  # submitted by hand, or continued by another job
    if launches:
        return folder, launches[-1].job_id
    exists = "nothing was launched into it" if folder.is_dir() else "there is no such folder or job"
    raise InputError(
        str(folder), rule=exists, fix="give a run's folder, or a number that squeue shows"
    )


def _later(attempt: Attempt, launch: Launch) -> bool:
    return attempt.series == launch.job_id or datetime.fromisoformat(
        attempt.began
    ) > datetime.fromisoformat(launch.time)


def _task_of_array(folder: Path) -> tuple[Path, str] | None:
    launches = read_launches(folder.parent) if folder.name.isdigit() else ()
    if not launches or int(folder.name) >= launches[-1].tasks:
        return None
    return folder.parent, f"{launches[-1].job_id}_{folder.name}"


def status(folder: Path | None, job_id: str) -> tuple[Status, ...]:
    """Return the state of a job, or of each task of an array.

    Raises:
        InputError: no Slurm here.
        WorkError: Slurm does not answer.
    """
    known = {state.job_id: state for state in slurm.states(job_id)}
    wanted = list(known) or _expected(folder, job_id)
    return tuple(_status(each, known.get(each), folder) for each in wanted)


def require_idle(folder: Path) -> None:
    """Check that no job of this run folder waits or runs: two would overwrite each other's
    checkpoints.

    Raises:
        InputError: one does, or may still; it is named.
    """
    launches = [each for each in read_launches(folder) if each.executor == "slurm"]
    jobs = dict.fromkeys(
        [each.job_id for each in launches[-1:]] + [each.job for each in read_attempts(folder)[-1:]]
    )
    for state in (state for job in jobs for state in slurm.states(job)):
        if not state.finished:
            raise InputError(
                f"{folder}: job {state.job_id} is {state.state}",
                rule="a run folder has one job at a time",
                fix=f"wait for it, `mellum2 launch cancel {state.job_id}`, or choose another --output",
            )


def _expected(folder: Path | None, job_id: str) -> list[str]:
    """Return the jobs that there must have been."""
    launch = next((each for each in reversed(_launches(folder)) if each.job_id == job_id), None)
    return (
        [f"{job_id}_{number}" for number in range(launch.tasks)]
        if launch and launch.tasks
        else [job_id]
    )


def _launches(folder: Path | None) -> tuple[Launch, ...]:
    return () if folder is None else read_launches(folder)


def _status(job_id: str, state: JobState | None, folder: Path | None) -> Status:
    place = _task_folder(folder, job_id)
    attempts = _attempts(place)
    last = attempts[-1] if attempts else None
    step = None if place is None or not place.is_dir() else reached_step(place)
    told = "" if last is None or last.kind is None or last.ended is None else last.reason
    if state is not None:
        # How the last attempt ended matters of a job that is over or starts anew, not of one that
        # runs.
        reason = (
            (state.reason or "")
            if state.state == "RUNNING"
            else "; ".join(filter(None, [state.reason, told]))
        )
        return Status(
            job_id=job_id,
            state=state.state,
            reason=reason,
            source="slurm",
            folder=place,
            step=step,
            attempts=len(attempts),
            nodes=state.nodes,
            elapsed=state.elapsed,
        )
    word = "UNKNOWN" if last is None or last.kind is None else _GONE[last.kind]
    return Status(
        job_id=job_id,
        state=word,
        reason=told or "Slurm no longer knows this job",
        source="nobody" if word == "UNKNOWN" else "records",
        folder=place,
        step=step,
        attempts=len(attempts),
    )


def _task_folder(folder: Path | None, job_id: str) -> Path | None:
    _, task = slurm.job_number(job_id)
    return folder if folder is None or task is None else folder / str(task)


def _attempts(folder: Path | None) -> tuple[Attempt, ...]:
    return () if folder is None or not (folder / ATTEMPTS_FILE).is_file() else read_attempts(folder)


def log_files(folder: Path, job_id: str) -> tuple[Path | None, dict[int, Path]]:
    """Return a job's logs that are there: the batch script's, and the nodes' by their number in the
    job."""
    script, nodes = None, {}
    ending = re.compile(rf"-{job_id}(?:-node(?P<node>\d+))?\.log")
    for path in (folder / LOGS_FOLDER).glob(f"*-{job_id}*.log"):
        found = next(
            (each for each in ending.finditer(path.name) if each.end() == len(path.name)), None
        )
        if found is not None and found["node"]:
            nodes[int(found["node"])] = path
        elif found is not None:
            script = path
    return script, dict(sorted(nodes.items()))


def rank_log(folder: Path, job_id: str, rank: int | None = None) -> Path | None:
    """Return the log of the node that a rank is on; None while there is none.

    Without a rank that of the last one, which has the losses and prints them.

    Raises:
        InputError: the job has no such rank.
    """
    launch = next(iter(reversed(_launches(folder))), None)
    nodes = log_files(folder, job_id)[1]
    if launch is None:  # submitted by hand
        return nodes[max(nodes)] if nodes else None
    last = launch.nodes * launch.ranks_per_node - 1
    rank = last if rank is None else rank
    if rank > last:
        raise InputError(
            f"--rank {rank}", rule=f"the job has ranks 0 to {last}", fix=f"use one of 0 to {last}"
        )
    return nodes.get(rank // launch.ranks_per_node)


def follow(path: Callable[[], Path | None], ended: Callable[[], bool]) -> Iterator[str]:
    """Yield a log's lines as they come, until the job has ended; the file need not be there yet."""
    current: Path | None = None
    position = 0
    rest = ""
    while True:
        last = ended()  # asked before reading: what was written until then is still shown
        found = path()
        if found is not None and found.is_file():
            if found != current:
                current, position = found, 0
            with found.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                text = rest + file.read()
                position = file.tell()
            *lines, rest = text.split("\n")
            yield from lines
        if last:
            break
        time.sleep(POLL_SECONDS)
    if rest:
        yield rest


def ended(job_id: str) -> Callable[[], bool]:
    """Return a function that says whether a job has ended for good."""
    return lambda: all(state.finished for state in slurm.states(job_id))


def launched(root: Path) -> Sequence[Path]:
    """Return the run folders in ``root`` that something was launched into, by time."""
    found = sorted(root.glob(f"*/{LAUNCH_FILE}"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in found]
