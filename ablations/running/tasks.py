"""The tasks of a study at a scale: one for each arm and seed, and what is left to do of each."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from ablations.asking.planned import Plan
from ablations.running.identity import changes, hash_on_disk, identity_of, task_hash
from ablations.running.results import (
    LOG_FILE,
    START,
    TASK_FILE,
    TaskRecord,
    read_task,
    settled,
    task_folder,
)
from launchers.early_end import LIMIT_FILE, LossLimit
from mellum2_megatron.checkpoint import read_run, write_run_folder
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run

LOCKS = ".locks"
"""Folder in the results with a lock for each task that runs, by hash."""

Todo = Literal["nothing", "run", "link", "wait"]
"""Work that a task needs: none, a training, a link to its twin, the end of another runner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One arm with one seed.

    Attributes:
        record: its record as it would be written, in state ``waiting``.
        run: its resolved run, with seed and output folder.
        folder: its folder.
        ranks: processes that it takes.
        after: task that it needs the weights of; None (default): none.
        limit: the study's stop rule for it; None (default): none.
    """

    record: TaskRecord
    run: Run
    folder: Path
    ranks: int
    after: Task | None = None
    limit: LossLimit | None = None

    @property
    def label(self) -> str:
        """Arm and seed in words."""
        return f"{self.record.arm} seed {self.record.seed}"

    @property
    def log(self) -> Path:
        """Output of its training."""
        return self.folder / LOG_FILE

    def prepare(self) -> None:
        """Write its run folder, its record and its limit. Nothing is trained yet."""
        _drop_dead_link(self.folder)
        write_run_folder(self.run)
        self.record.write(self.folder)
        if self.limit is None:
            (self.folder / LIMIT_FILE).unlink(missing_ok=True)
        else:
            self.limit.write(self.folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A task as it is on disk.

    Attributes:
        task: the task.
        record: its record; None: it has left nothing.
        todo: work that it needs.
        twin: folder of the same task of another study, for ``link``; None otherwise.
    """

    task: Task
    record: TaskRecord | None
    todo: Todo
    twin: Path | None = None


def tasks_of(
    plan: Plan,
    results: Path,
    seeds: Sequence[int],
    *,
    arms: Sequence[str] = (),
    wandb_project: str | None = None,
) -> list[Task]:
    """Return the tasks of a plan, by seed and then by arm, after those that they start from.

    Args:
        plan: the plan.
        results: folder of all results.
        seeds: seeds of the runs.
        arms: names of the arms to run; default all.
        wandb_project: project on Weights & Biases; None (default): do not log there.

    Raises:
        InputError: data that do not fit a run, or an unknown arm.
    """
    for name in arms:
        plan.arm(name)
    results, rule = Path(os.path.abspath(results)), plan.study.stop

    def made(name: str, run: Run, seed: int, after: Task | None, identity: dict[str, str]) -> Task:
        folder = task_folder(results, plan.name, plan.scale, name, seed)
        run = dataclasses.replace(
            run,
            seed=seed,
            name=f"{plan.name}-{name}-{seed}"[:128],
            checkpoint=dataclasses.replace(
                run.checkpoint,
                output=str(folder),
                load=None if after is None else str(after.folder),
            ),
            logging=run.logging
            if wandb_project is None
            else dataclasses.replace(run.logging, wandb_project=wandb_project),
        )
        if after is not None:
            identity = {**identity, "start": after.record.hash}
        record = TaskRecord(
            study=plan.name,
            scale=plan.scale,
            arm=name,
            seed=seed,
            hash=task_hash(run, identity),
            identity=identity,
            state="waiting",
        )
        return Task(
            record=record,
            run=run,
            folder=folder,
            ranks=plan.world_size,
            after=after,
            # Weights that arms start from are no answer, so the rule does not end their training.
            limit=None if rule is None or name == START else rule.limit(run.schedule.train_steps),
        )

    # The data are read once for an arm, not for each of its seeds.
    start_identity = {} if plan.start is None else identity_of(plan.start)
    chosen = [arm for arm in plan.arms if not arms or arm.arm.name in arms]
    identities = [identity_of(arm.run) for arm in chosen]
    tasks = []
    for seed in seeds:
        start = None
        if plan.start is not None:
            start = made(START, plan.start, seed, None, start_identity)
            tasks.append(start)
        tasks += [
            made(arm.arm.name, arm.run, seed, start, identity)
            for arm, identity in zip(chosen, identities, strict=True)
        ]
    return tasks


def examine(
    tasks: Sequence[Task], results: Path, *, locked: bool = False, jobs: Collection[Path] = ()
) -> list[Progress]:
    """Return what is on disk of each task, and what is left to do.

    Args:
        tasks: the tasks.
        results: folder of all results.
        locked: the caller has the tasks' locks, default false.
        jobs: folders of tasks that wait or run on a cluster, default none.

    Raises:
        InputError: results of another recipe are in a task's folder.
    """
    progress = []
    for task in tasks:
        record = read_task(task.folder)
        if record is not None:
            _require_same(task, record)
            record = settled(task.folder, record)
        if record is not None and record.state in ("done", "early"):
            progress.append(Progress(task=task, record=record, todo="nothing"))
            continue
        if task.folder in jobs or (not locked and _is_locked(results, task.record.hash)):
            progress.append(Progress(task=task, record=record, todo="wait"))
            continue
        if record is not None and record.state == "running":
            # Its runner is gone: it was killed.
            record = record.replace(state="stopped", message="its runner was killed")
        twin = None if record is not None else find_twin(results, task)
        todo: Todo = "run" if twin is None else "link"
        progress.append(Progress(task=task, record=record, todo=todo, twin=twin))
    return progress


def find_twin(results: Path, task: Task) -> Path | None:
    """Return the folder of the same task, finished, of any study; None: there is none."""
    for file in sorted(results.glob(f"*/*/*/seed_*/{TASK_FILE}")):
        folder = file.parent
        if folder.is_symlink() or folder == task.folder or not (folder / RUN_FILE).is_file():
            continue
        # A damaged folder is no twin, and its own study reports it.
        with suppress(InputError):
            record = read_task(folder)
            if (
                record is not None
                and record.seed == task.record.seed
                and record.identity == task.record.identity
                and settled(folder, record).state == "done"
                and hash_on_disk(folder, record.identity) == task.record.hash
            ):
                return folder
    return None


def link_twin(task: Task, twin: Path) -> None:
    """Make a task's folder a link to the same task of another study."""
    task.folder.parent.mkdir(parents=True, exist_ok=True)
    _drop_dead_link(task.folder)
    task.folder.symlink_to(os.path.relpath(twin.resolve(), task.folder.parent.resolve()))


def _drop_dead_link(folder: Path) -> None:
    """Remove a link to a twin whose study has been deleted since."""
    if folder.is_symlink() and not folder.exists():
        folder.unlink()


def try_lock(results: Path, key: str) -> IO[bytes] | None:
    """Take the lock of a task; None if another runner has it.

    The lock is free again once the file is closed in every process that inherited it, so a training
    whose runner was killed keeps it.
    """
    folder = results / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / key
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        # Another user's file: on a local disk a lock needs no right to write.
        if not path.is_file():
            raise
        descriptor = os.open(path, os.O_RDONLY)
    file = os.fdopen(descriptor, "rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _is_locked(results: Path, key: str) -> bool:
    if not (results / LOCKS / key).exists():
        return False
    lock = try_lock(results, key)
    if lock is not None:
        lock.close()
    return lock is None


def _require_same(task: Task, record: TaskRecord) -> None:
    """Refuse a folder whose run, data or packages are not the task's."""
    folder = task.folder
    if not (folder / RUN_FILE).is_file():
        return
    old = read_run(folder / RUN_FILE, warn=False)
    if task_hash(old, record.identity) == task.record.hash:
        return
    changed = changes(old, task.run, record.identity, task.record.identity)
    raise InputError(
        f"{folder}, hash {record.hash}",
        rule=f"has results of another recipe than {task.label} has now, hash {task.record.hash} "
        f"({'; '.join(changed[:3]) or 'a key of another version'}"
        + (f"; and {len(changed) - 3} more)" if len(changed) > 3 else ")"),
        fix=f"give another --results, move {folder.parents[1]} away, or undo the change",
    )


def seeds_upto(count: int) -> Iterator[int]:
    """Yield the first seeds of a study: 1, 2, 3 .."""
    yield from range(1, count + 1)
