"""The tasks of a study as a matrix of arms and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType

from ablations.running.tasks import Progress
from launchers.outcome import read_attempts
from launchers.status import log_files
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.checkpoint.run_list import RunOnDisk
from mellum2_megatron.common.console import plain_table


def state_of(entry: Progress) -> str:
    """Return a task's state in a word or two: ``done``, ``failed``, ``running 120/240``, ``-``."""
    if entry.todo == "wait":
        if (entry.task.folder / RUN_FILE).is_file():
            run = RunOnDisk.of(entry.task.folder)
            if run.state != "new":
                return f"running {run.step}/{run.steps}"
        return "waiting"
    return "-" if entry.record is None else entry.record.state


def status_rows(progress: Sequence[Progress]) -> list[dict[str, Any]]:
    """Return a row of JSON types for each task."""
    return [
        {
            "arm": entry.task.record.arm,
            "seed": entry.task.record.seed,
            "state": state_of(entry),
            "todo": entry.todo,
            "hash": entry.task.record.hash,
            "folder": str(entry.task.folder),
            "shared_with": None if entry.twin is None else str(entry.twin),
            "message": "" if entry.record is None else entry.record.message,
        }
        for entry in progress
    ]


def failure_of(entry: Progress) -> str:
    """Return a failed task's reason and log: the runner's, or those of its last batch job."""
    task = entry.task
    reason, log = "" if entry.record is None else entry.record.message, task.log
    attempts = read_attempts(task.folder)
    if attempts and not log.is_file():
        reason = attempts[-1].reason
        script, nodes = log_files(task.folder.parents[1], attempts[-1].job)
        log = next((file for file in (*nodes.values(), script) if file is not None), log)
    return f"{task.label}: {reason}; log {log}"


def render_status(title: str, progress: Sequence[Progress]) -> RenderableType:
    """Return the matrix of states, then the failed tasks with their logs."""
    arms = list(dict.fromkeys(entry.task.record.arm for entry in progress))
    seeds = sorted({entry.task.record.seed for entry in progress})
    cells = {(entry.task.record.arm, entry.task.record.seed): state_of(entry) for entry in progress}
    table = plain_table("arm", *(f"seed {seed}" for seed in seeds), title=title)
    for arm in arms:
        table.add_row(arm, *(cells.get((arm, seed), "") for seed in seeds))
    lines = [
        failure_of(entry)
        for entry in progress
        if entry.record is not None and entry.record.state == "failed" and entry.todo != "wait"
    ]
    left = sum(entry.todo in ("run", "link") for entry in progress)
    lines.append(f"{len(progress)} tasks, {left} to run")
    return Group(table, "", *lines)


def render_tasks(progress: Sequence[Progress]) -> RenderableType:
    """Return a line for each task: state, what a run would do, and its hash."""
    table = plain_table("arm", "seed", "state", "next", "hash")
    for entry in progress:
        work = entry.todo if entry.twin is None else f"link to {entry.twin}"
        record = entry.task.record
        table.add_row(record.arm, str(record.seed), state_of(entry), work, record.hash)
    return table
