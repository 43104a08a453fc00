"""Builds the sample indices of a run before it starts, in several processes.

Each index is built by the dataset class of the run (`data.feed.indexed_documents`), so a start
finds what it would have written itself. Files appear complete, and a second call does what is
missing. It also compares the files that are there with their hashes, and builds damaged ones anew.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mellum2_megatron import upstream
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import (
    check_writable,
    existing_ancestor,
    size_text,
    write_json,
)
from mellum2_megatron.common.free_memory import free_memory
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.config import Run
from mellum2_megatron.data.feed.index_plan import ARRAYS, HASHES, SampleIndex, run_indices
from mellum2_megatron.data.feed.sources import check_amounts, check_data

_FREE_SHARE = 0.8
"""Share of the free memory that is taken by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltIndex:
    """An index that is complete now.

    Attributes:
        index: the index.
        state: built; found, with its hashes as written down; recorded: found, hashes written down
            now; mended: another hash than written down, so built anew.
        seconds: time that it took.
    """

    index: SampleIndex
    state: Literal["built", "found", "recorded", "mended"]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexPlan:
    """The indices of a run, checked.

    Attributes:
        indices: all of them.
        missing: those whose files are not complete.
        memory: bytes that the processes may take together.
    """

    indices: tuple[SampleIndex, ...]
    missing: tuple[SampleIndex, ...]
    memory: int


def plan_indices(run: Run, *, memory: int | None = None) -> IndexPlan:
    """Find and check the indices of a run. Writes nothing.

    Args:
        run: a resolved run.
        memory: bytes that the processes may take together; None: 80% of what is free.

    Raises:
        InputError: bad data; a run that needs no index; a folder that cannot be written; or too
            little disk or memory for what is missing.
    """
    data = check_data(run)
    check_amounts(run, data)
    indices = run_indices(run, data)
    if run.data.feed == "rollouts":
        raise InputError(
            "data.feed=rollouts", rule="tasks need no index", fix="start the run as it is"
        )
    if not indices:
        first = next(iter((*data.train, *data.valid)))
        raise InputError(
            f"{first.key}: {first.prefix.parent}",
            rule="packs need no index: the order of their samples is a rule",
            fix="start the run as it is",
        )
    missing = [index for index in indices if not index.is_complete()]
    # A folder of complete and hashed indices may be read-only: it is only read.
    written = [index for index in indices if index in missing or not index.file(HASHES).is_file()]
    for index in written:
        own = f"{index.source.key}: {index.source.prefix}: its folder of indices"
        name = own if run.data.cache is None else "data.cache"
        check_writable(name, index.cache, folder=True)
    _check_disk(missing)
    if memory is None:
        memory = int(_FREE_SHARE * free_memory())
    for index in missing:
        if index.memory > memory:
            raise InputError(
                f"{index.source.key}: {index.source.prefix}",
                rule=f"building its index of {index.entries[0]:,} documents and "
                f"{index.entries[1]:,} samples takes {size_text(index.memory)} of memory, and "
                f"{size_text(memory)} may be used",
                fix="raise --memory, use a larger machine, or write it as several sets and blend "
                "them (data.train)",
            )
    return IndexPlan(indices=tuple(indices), missing=tuple(missing), memory=memory)


def _check_disk(missing: Sequence[SampleIndex]) -> None:
    needed: dict[int, int] = defaultdict(int)
    caches: dict[int, Path] = {}
    for index in missing:
        place = existing_ancestor(index.cache)
        needed[place.stat().st_dev] += index.size
        caches[place.stat().st_dev] = index.cache
    for disk, size in needed.items():
        free = shutil.disk_usage(existing_ancestor(caches[disk])).free
        if size > free:
            raise InputError(
                f"data.cache: {caches[disk]}",
                rule=f"the missing indices have {size_text(size)}, and {size_text(free)} are free "
                "on its disk",
                fix="free the space, or set data.cache to a folder on another disk, here and for "
                "the run",
            )


def build_indices(plan: IndexPlan, *, workers: int) -> Iterator[BuiltIndex]:
    """Build what is missing, and hash what is there; yield each index as it is complete.

    As many run at once as fit the plan's memory, the largest first. A failed one does not keep the
    others from ending; the first failure is raised at the end.

    Args:
        plan: the checked plan.
        workers: number of processes, at most.

    Raises:
        WorkError: a process was killed.
        OSError: a disk is full or fails.
    """
    waiting = sorted(plan.indices, key=lambda index: index.memory, reverse=True)
    running: dict[Future[BuiltIndex], SampleIndex] = {}
    first: BaseException | None = None
    # Spawned, not forked: each process imports torch and sets its own threads.
    with ProcessPoolExecutor(
        min(workers, len(waiting)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_process,
    ) as pool:
        try:
            while waiting or running:
                while len(running) < workers:
                    fitting = _first_fitting(waiting, [*running.values()], plan.memory)
                    if fitting is None:
                        break
                    waiting.remove(fitting)
                    running[pool.submit(_complete, fitting)] = fitting
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    index = running.pop(future)
                    failure = future.exception()
                    if failure is None:
                        yield future.result()
                    elif isinstance(failure, BrokenProcessPool):
                        raise WorkError(
                            f"{index.source.prefix}: a process that builds an index was killed",
                            fix="free memory or use a smaller --memory, and run it again; what is "
                            "complete stays",
                        ) from failure
                    else:
                        first = first or failure
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if first is not None:
        raise first


def _first_fitting(
    waiting: Sequence[SampleIndex], running: Sequence[SampleIndex], memory: int
) -> SampleIndex | None:
    """Return the first index that fits into the memory beside those that run, or None."""
    left = memory - sum(index.memory for index in running)
    for index in waiting:
        # Alone anything may run: a complete one that is larger is only hashed.
        if not running or index.memory <= left:
            return index
    return None


def _start_process() -> None:
    # The processes are the parallelism.
    os.environ["OMP_NUM_THREADS"] = "1"
    upstream.quiet_upstream()
    upstream.activate()


def _complete(index: SampleIndex) -> BuiltIndex:
    """Build an index or check it, and write its hashes down."""
    from mellum2_megatron.data.feed.datasets import open_documents

    start = time.monotonic()
    state: Literal["built", "found", "recorded", "mended"] = "built"
    if index.is_complete():
        written, found = _written_hashes(index), _hashes(index)
        state = "recorded" if written is None else "found"
        damaged = (
            [] if written is None else [kind for kind in ARRAYS if written[kind] != found[kind]]
        )
        for kind in damaged:
            # A run that has it mapped keeps its file.
            index.file(kind).unlink()
            state = "mended"
    if state in ("built", "mended"):
        open_documents(index)
        found = _hashes(index)
    if state != "found":
        write_json(index.file(HASHES), found)
    return BuiltIndex(index=index, state=state, seconds=time.monotonic() - start)


def _hashes(index: SampleIndex) -> dict[str, str]:
    """Return the SHA-256 of each array, hexadecimal."""
    hashes = {}
    for kind in ARRAYS:
        with index.file(kind).open("rb") as stream:
            hashes[kind] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _written_hashes(index: SampleIndex) -> dict[str, str] | None:
    """Return the hashes that were written down; None if there are none, or they are damaged."""
    try:
        hashes = load_json(index.file(HASHES))
    except (OSError, ValueError):
        return None
    return hashes if set(hashes) == set(ARRAYS) else None
