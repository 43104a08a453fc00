"""Checks of a run's folder and of the checkpoint that it loads, before anything is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from mellum2_megatron.checkpoint.file_manifest import bytes_to_check, check_hashes, check_sizes
from mellum2_megatron.checkpoint.folder import (
    ARCHITECTURE_FILE,
    ROTATION,
    TRACKER_FILE,
    iteration_folders,
    read_architecture,
)
from mellum2_megatron.checkpoint.run_folder import output_folder
from mellum2_megatron.checkpoint.starting_point import StartingPoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import check_writable, existing_ancestor, size_text
from mellum2_megatron.config import Run

_SHOW_PROGRESS_FROM = 2 * 10**9
"""Show a progress bar if a rank hashes at least this many bytes."""


def check_run_folder(run: Run, start: StartingPoint) -> None:
    """Check that the run can write to its output folder and load the checkpoint it starts from.

    Writes nothing.

    Args:
        run: a resolved run.
        start: starting point of the run.

    Raises:
        InputError: one of these. The output folder is not named, is a file or not writable, lies on
            a disk without room for one checkpoint, or holds checkpoints of another architecture or
            project. `checkpoint.load` or `checkpoint.continue_from` is no checkpoint of this
            architecture, or the latter's state does not fit this run. A file of the checkpoint to
            load is missing or cut short.
    """
    root = output_folder(run)
    check_writable("--output", root, folder=True)
    if (root / ARCHITECTURE_FILE).exists():
        _require_same_architecture(run, root, "checkpoint.output", "choose another --output")
    elif iteration_folders(root) or (root / TRACKER_FILE).exists():
        # Megatron would load them into this run's model, or fail on shapes much later.
        raise InputError(
            f"checkpoint.output={root}",
            rule=f"holds checkpoints without {ARCHITECTURE_FILE}, "
            "so this project did not write them",
            fix="choose another --output",
        )
    if start.kind == "resume":
        # Megatron would start from step 0, without a message, if the tracked checkpoint is gone.
        start.require_checkpoint()
    check_loaded(run, start)
    if start.kind in ("new", "weights") and run.data.first_sample:
        raise InputError(
            f"data.first_sample={run.data.first_sample} in a run that starts at sample 0",
            rule="its data begin where another run ended",
            fix="name that run's folder as checkpoint.continue_from, or set data.first_sample=0",
        )
    # The folder may not exist yet; its closest existing parent is on the same disk.
    place, needed = existing_ancestor(root), checkpoint_bytes(run)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"--output {root}",
            rule=f"its disk ({place}) has {size_text(free)} free, "
            f"one checkpoint of this run takes {size_text(needed)}",
            fix="free space, or name a folder on another disk",
        )


def check_loaded(run: Run, start: StartingPoint) -> None:
    """Check that the run can load the checkpoint it starts from, the output folder apart.

    Raises:
        InputError: `checkpoint.load` or `checkpoint.continue_from` is no checkpoint of this
            architecture, or the latter's state does not fit this run. A file of the checkpoint to
            load is missing or cut short.
    """
    if start.kind == "weights":
        # Only then: a resume does not read these weights, which may be gone by now.
        _require_same_architecture(
            run,
            start.require_checkpoint().root,
            "checkpoint.load",
            f"add architecture={run.checkpoint.load}, or load a checkpoint of this architecture",
            besides=ROTATION,
        )
        _require_same_router_bias(run, start)
    if start.kind == "continue":
        _check_continuation(run, start)
    # A size costs one stat, so every process checks all files. Hashes are divided among the ranks
    # (`check_share`).
    if start.checkpoint is not None and run.checkpoint.verify != "off":
        check_sizes(start.checkpoint)


def check_share(run: Run, start: StartingPoint, *, rank: int, world_size: int) -> None:
    """Hash this rank's share of the checkpoint's files and compare it with the manifest.

    Does nothing unless `checkpoint.verify` is ``hash``.

    Args:
        run: a resolved run.
        start: starting point of the run.
        rank: rank of this process.
        world_size: number of ranks.

    Raises:
        InputError: a file has changed since it was written.
    """
    source = start.checkpoint
    if source is None or run.checkpoint.verify != "hash":
        return
    # All ranks of a machine hash at the same time, so they divide its cores.
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, len(os.sched_getaffinity(0)) // local_ranks)
    total = bytes_to_check(source, part=rank, parts=world_size)
    # All shares are about as large, so one bar on rank 0 is enough.
    if rank or total < _SHOW_PROGRESS_FROM:
        check_hashes(source, part=rank, parts=world_size, threads=threads)
        return
    from mellum2_megatron.common.byte_progress import byte_progress

    with byte_progress(f"checking {source.iteration_dir.name}", total) as advance:
        check_hashes(source, part=rank, parts=world_size, threads=threads, advance=advance)


def checkpoint_bytes(run: Run) -> int:
    """Return the size of the tensors in one checkpoint of the run, in bytes.

    A weight is stored in BF16 and as FP32 master: 6 bytes. Adam adds its two FP32 moments, Muon
    one FP32 momentum for each matrix that it updates.
    """
    total = 0
    for parameter in run.architecture.parameters():
        total += parameter.numel * (10 if run.optimizer.uses_muon(parameter) else 14)
    return total


def _check_continuation(run: Run, start: StartingPoint) -> None:
    """Check that the state named by `checkpoint.continue_from` fits the run."""
    source, first = start.require_checkpoint(), run.data.first_sample
    key = f"checkpoint.continue_from={run.checkpoint.continue_from}"
    _require_same_architecture(
        run, source.root, "checkpoint.continue_from", "continue a run of this architecture"
    )
    if source.iteration is None or (start.before is None and start.before_error is None):
        raise InputError(
            key,
            rule="holds weights without a run's state",
            fix="use checkpoint.load, or name a run's output folder",
        )
    if start.names_iteration:
        # Megatron's --load takes a folder of checkpoints, and loads the one in its tracker.
        raise InputError(
            key,
            rule="a run continues the newest checkpoint of another",
            fix=f"use checkpoint.continue_from={source.root}",
        )
    if start.before_error is not None:
        raise start.before_error
    assert start.before is not None
    before = start.before.schedule
    # Megatron takes the sample count from the checkpoint and the batch size from this run's
    # schedule. The two schedules must therefore agree up to that step.
    reached, reached_by_run = (
        schedule.samples(source.iteration) for schedule in (before, run.schedule)
    )
    if reached_by_run != reached:
        raise InputError(
            f"schedule.batch_schedule={list(map(list, run.schedule.batch_schedule))} with {key}",
            rule=f"step {source.iteration} there is sample {reached}, here {reached_by_run}",
            fix=f"use schedule.batch_schedule={list(map(list, before.batch_schedule))}",
        )
    if reached < first:
        if reached < before.train_samples:
            fix = f"let it train on until schedule.train_samples={before.train_samples}"
        else:
            fix = f"set data.first_sample={reached}"
        raise InputError(
            f"data.first_sample={first} with {key}",
            rule=f"that run has reached sample {reached} (step {source.iteration}) only",
            fix=fix,
        )


def _require_same_router_bias(run: Run, start: StartingPoint) -> None:
    """Refuse weights with a bias on the routers' scores in a run without, and the reverse."""
    has_bias = start.before is not None and start.before.loss.bias_update_rate > 0
    if has_bias == (run.loss.bias_update_rate > 0):
        return
    if has_bias:
        rule, fix = "its experts were chosen with a router bias", "set it as in the run loaded"
    else:
        rule, fix = "has no router bias to start from", "set loss.bias_update_rate=0"
    raise InputError(
        f"checkpoint.load={run.checkpoint.load} with "
        f"loss.bias_update_rate={run.loss.bias_update_rate}",
        rule=rule,
        fix=fix,
    )


def _require_same_architecture(
    run: Run, root: Path, key: str, fix: str, *, besides: Sequence[str] = ()
) -> None:
    """Refuse a checkpoint of another architecture.

    Args:
        run: the run that loads the checkpoint.
        root: folder of the checkpoint.
        key: key of the run that names the folder, for the message.
        fix: fix in the message.
        besides: fields of the architecture that may differ, default none.
    """
    saved, wanted = read_architecture(root).to_dict(), run.architecture.to_dict()
    differing = [
        f"{name}: {saved[name]!r} there, {wanted[name]!r} here"
        for name in wanted
        if saved[name] != wanted[name] and name not in besides
    ]
    if differing:
        raise InputError(
            f"{key}={root}",
            rule="holds another architecture (" + "; ".join(differing) + ")",
            fix=fix,
        )
