"""Results on disk, as the runner leaves them and a report reads them.

::

    RESULTS/STUDY/SCALE/ARM/seed_N/     a run folder: run.yaml, metrics.jsonl, provenance.jsonl, ..
    RESULTS/STUDY/SCALE/ARM/seed_N/task.json    `TaskRecord`
    RESULTS/STUDY/SCALE/ARM/seed_N/task.log     output of the training
    RESULTS/STUDY/SCALE/_start/seed_N/  training of the weights that all arms start from

A folder may be a symbolic link to the same task of another study: identical tasks are run once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ablations.asking.study import Scale
from launchers.early_end import ended_early
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.checkpoint.run_list import RunOnDisk
from mellum2_megatron.common.field_checks import require
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.json_files import read_record
from mellum2_megatron.common.values import to_plain
from mellum2_megatron.metrics.log import METRICS_FILE

RESULTS = Path("ablation_results")
"""Default folder of all results."""

TASK_FILE = "task.json"
LOG_FILE = "task.log"
START = "_start"
"""Folder in place of an arm's, for the weights that all arms start from."""

State = Literal["waiting", "running", "done", "failed", "stopped", "early"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRecord:
    """Content of a task's `TASK_FILE`.

    Attributes:
        study, scale, arm, seed: the task.
        hash: hash of all that decides its numbers, see `ablations.running.identity`.
        identity: the hash's parts besides the run itself: contents of the data and of the weights
            that it starts from, versions of packages.
        state: ``waiting``: written, not started. ``running``: started. ``done``: the last step is
            saved. ``failed``: it ended otherwise. ``stopped``: interrupted, it goes on when it is
            run again. ``early``: ended by the study's stop rule.
        message: reason of a state that is not ``done``; empty (default): none.
        started, ended: times of the last start and its end, ISO 8601, UTC; empty (default): none.
        exit_code: exit code of the last start; None (default): none has ended.
        seconds: duration of the last start; 0 (default): unknown.
    """

    study: str
    scale: Scale
    arm: str
    seed: int
    hash: str
    identity: dict[str, str]
    state: State
    message: str = ""
    started: str = ""
    ended: str = ""
    exit_code: int | None = None
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        """Write the record into a task's folder, which may be absent yet."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TASK_FILE, to_plain(self))

    def replace(self, **changes: object) -> TaskRecord:
        """Return a record with other values."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOnDisk:
    """A task that has left results.

    Attributes:
        folder: its run folder.
        record: its record.
    """

    folder: Path
    record: TaskRecord


def task_folder(results: Path, study: str, scale: Scale, arm: str, seed: int) -> Path:
    """Return the folder of a task."""
    return results / study / scale / arm / f"seed_{seed}"


def read_task(folder: Path) -> TaskRecord | None:
    """Return the record in a task's folder; None without one.

    Raises:
        InputError: the file is damaged.
    """
    return read_record(
        TaskRecord,
        folder / TASK_FILE,
        what="record of a task",
        fix="delete the folder that it is in, and run the study again",
    )


def settled(folder: Path, record: TaskRecord) -> TaskRecord:
    """Return a task's record with the state that its run folder shows.

    A batch job, or a training whose runner was killed, cannot write the record itself.

    Raises:
        InputError: it is done, and a file that a report needs is gone.
    """
    if record.state == "done":
        for name in (RUN_FILE, METRICS_FILE):
            require(
                (folder / name).is_file(),
                f"{folder}",
                rule=f"its task is done, but its {name} is not there",
                fix="put the file back, or delete the folder and run the study again",
            )
    if record.state in ("done", "early") or not (folder / RUN_FILE).is_file():
        return record
    if reason := ended_early(folder):
        return record.replace(state="early", message=reason)
    run = RunOnDisk.of(folder)
    if run.state == "finished":
        return record.replace(state="done", message="")
    if record.state in ("waiting", "running") and run.state in ("failed", "stopped", "running"):
        return record.replace(state=run.state)
    return record


def tasks_on_disk(results: Path, study: str, scale: Scale) -> Iterator[TaskOnDisk]:
    """Yield the tasks of a study that have results, by arm and rising seed.

    Tasks of `START` are left out. A task that another study has run has that study's record but for
    the names of study and arm, which are those of the folder.
    """
    root = results / study / scale
    found = []
    for folder in root.glob("*/seed_*"):
        number = re.fullmatch(r"seed_([0-9]+)", folder.name)
        record = read_task(folder)
        if number is None or record is None or folder.parent.name == START:
            continue
        own = settled(folder, record).replace(
            study=study, scale=scale, arm=folder.parent.name, seed=int(number[1])
        )
        found.append(TaskOnDisk(folder=folder, record=own))
    yield from sorted(found, key=lambda task: (task.record.arm, task.record.seed))
