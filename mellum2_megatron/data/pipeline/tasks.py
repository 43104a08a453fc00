"""Tasks of a plan: each makes one folder, named by all that decides its content.

A task's name ends in the hash of its stage's code version, its settings and the names of the
results it reads. The folder appears at once and complete. So a second run does what is missing, a
changed setting makes other names, and a process killed anywhere leaves nothing that a later run
could take for a result. Any number of processes, on any number of machines with a shared disk, may
run tasks of one stage; two that make the same folder make the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mellum2_megatron.common import staging
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import atomic_directory, check_size, write_json
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.common.values import to_plain

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

Work = Callable[["Task", Path, Path], dict[str, Any]]
"""Function of a task, the folder of all results and the empty folder to fill, to its counts."""


class Named:
    """The folder of one result, found by its name.

    Attributes:
        name: name of the folder, ``STAGE/LABEL-HASH``.
        stage: name of the stage that makes it.
        source: name of the plan's source, for reports; empty when it serves several.
    """

    name: str
    stage: str
    source: str

    def folder(self, results: Path) -> Path:
        """Folder of the result."""
        return results / self.name

    def done(self, results: Path) -> bool:
        """Return true if the result is there; folders appear complete."""
        return (self.folder(results) / MANIFEST).is_file()

    def manifest(self, results: Path) -> dict[str, Any]:
        """Return the counts of a finished task.

        Raises:
            InputError: the result is missing or its manifest is damaged.
        """
        path = self.folder(results) / MANIFEST
        if not path.parent.is_dir():
            raise InputError(
                str(results),
                rule=f"stage {self.stage} of the plan has not ended",
                fix="run it to its end with `mellum2 data run PLAN`; it does what is missing",
            )
        try:
            return load_json(path)
        except (OSError, ValueError) as error:
            raise InputError(
                str(path),
                rule=f"the result of stage {self.stage} cannot be read ({error})",
                fix=f"remove {self.folder(results)} and run the plan again",
            ) from None

    def check_files(self, results: Path) -> None:
        """Refuse a result with a file that is missing or has not its full length.

        Raises:
            InputError: such a file, or a damaged manifest.
        """
        again = f"remove {self.folder(results)} and run the plan again"
        try:
            sizes = {
                name: int(facts["bytes"]) for name, facts in self.manifest(results)["files"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(
                str(self.folder(results) / MANIFEST), rule="it lists no files", fix=again
            ) from None
        for name, size in sizes.items():
            check_size(self.folder(results) / name, size, fix=again)


@functools.cache
def _check_once(result: Result, results: Path) -> None:
    """Check a result once a process: the tasks of a stage share most of their inputs."""
    result.check_files(results)


@dataclass(frozen=True, kw_only=True)
class Result(Named):
    """A result as other tasks know it, without the work that makes it."""

    name: str
    stage: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Task(Named):
    """One unit of work.

    Attributes:
        stage: name of the stage.
        label: readable part of the name, unique in the stage: ``code-00003``.
        version: version of the stage's code; a change of its results needs a new one.
        work: module-level function that fills the folder.
        settings: plain values that decide the content.
        inputs: results that it reads, in order. A task is sent to a worker with its inputs, so they
            are `Result`s: with whole tasks every message would hold all stages before.
        source: name of the plan's source, for reports; empty when it serves several.
        places: paths that the work needs and that decide nothing, such as where inputs lie.
    """

    stage: str
    label: str
    version: int
    work: Work
    settings: dict[str, Any]
    inputs: tuple[Named, ...] = field(default=(), repr=False)
    source: str = ""
    places: dict[str, str] = field(default_factory=dict, repr=False)

    @cached_property
    def name(self) -> str:  # type: ignore[override]
        """Name of the result folder, ``STAGE/LABEL-HASH``."""
        facts = {
            "stage": self.stage,
            "label": self.label,
            "version": self.version,
            "settings": to_plain(self.settings),
            "inputs": [one.name for one in self.inputs],
        }
        text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
        return f"{self.stage}/{self.label}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def result(self) -> Result:
        """The result, as an input of other tasks."""
        return Result(name=self.name, stage=self.stage, source=self.source)


def run_task(task: Task, results: Path) -> bool:
    """Run a task unless its result is there; return whether it ran.

    Raises:
        InputError: a fault of the input; nothing is left behind.
        WorkError: the disk is full or cannot be written.
    """
    if task.done(results):
        return False
    for needed in task.inputs:
        if not needed.done(results):
            raise InputError(
                f"task {task.name}",
                rule=f"it reads {needed.name}, which is not there",
                fix=f"run stage {needed.stage} first",
            )
        _check_once(Result(name=needed.name, stage=needed.stage, source=needed.source), results)
    target = task.folder(results)
    try:
        with atomic_directory(target) as folder:
            counts = task.work(task, results, folder)
            facts = {
                "stage": task.stage,
                "label": task.label,
                "source": task.source,
                "version": task.version,
                "settings": to_plain(task.settings),
                "inputs": [needed.name for needed in task.inputs],
                "files": _files(folder),
            }
            if taken := facts.keys() & counts.keys():
                raise ValueError(f"stage {task.stage} counts {sorted(taken)}; the name is taken")
            # The manifest is written last: `done` looks for it.
            write_json(folder / MANIFEST, {**facts, **counts})
    except OSError as error:
        if task.done(results):
            # Another process finished the same task first; its bytes are the same.
            return False
        fix = f"free space on the disk of {results}, and run the plan again"
        if isinstance(error, FileNotFoundError):
            fix = "if it is an input, put it back; else remove its folder; then run the plan again"
        raise WorkError(f"stage {task.stage}, {task.label}: {error}", fix=fix) from error
    return True


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file of a result."""
    facts = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        facts[name] = {"bytes": path.stat().st_size, "sha256": digest}
    return facts


def remove_leftovers(results: Path, tasks: Sequence[Task]) -> None:
    """Remove the unfinished folders of processes that were killed."""
    for stage in {task.stage for task in tasks}:
        staging.remove_leftovers(results / stage)


def run_stage(tasks: Sequence[Task], results: Path, *, workers: int) -> Iterator[tuple[Task, bool]]:
    """Run the tasks of one stage in up to ``workers`` processes; yield each as it ends.

    A failed task does not keep the others from ending. The first failure is raised at the end.

    Raises:
        InputError, WorkError: see `run_task`; also a worker that was killed.
    """
    remove_leftovers(results, tasks)
    missing = []
    for task in tasks:
        if task.done(results):
            yield task, False
        else:
            missing.append(task)
    if workers == 1 or len(missing) <= 1:
        failures = []
        for task in missing:
            try:
                yield task, run_task(task, results)
            except (InputError, WorkError) as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return
    # Spawned, not forked: a forked tokenizer may deadlock on its thread pool.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(missing)), mp_context=context, initializer=_one_thread
    ) as pool:
        running = {pool.submit(run_task, task, results): task for task in missing}
        first: BaseException | None = None
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                failure = future.exception()
                if failure is None:
                    yield task, future.result()
                elif isinstance(failure, BrokenProcessPool):
                    raise WorkError(
                        f"stage {task.stage}: a worker was killed",
                        fix="free memory or use fewer --workers, and run the plan again",
                    ) from failure
                else:
                    first = first or failure
        if first is not None:
            raise first


def _one_thread() -> None:
    # The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
