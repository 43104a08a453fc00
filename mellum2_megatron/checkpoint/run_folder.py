"""What a run leaves beside its checkpoints: the resolved run, the architecture and the
tokenizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from mellum2_megatron.checkpoint.file_manifest import bytes_to_check, check_hashes, check_sizes
from mellum2_megatron.checkpoint.folder import (
    ARCHITECTURE_FILE,
    ROTATION,
    RUN_FILE,
    TOKENIZER_FOLDER,
    TRACKER_FILE,
    CheckpointFolder,
    find_checkpoint,
    iteration_folders,
    read_architecture,
    resume_folder,
    write_architecture,
)
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import (
    atomic_directory,
    check_writable,
    existing_ancestor,
    size_text,
    write_text,
)
from mellum2_megatron.config import Run, from_yaml, to_yaml
from mellum2_megatron.data.tokens.tokenizer import copy_tokenizer

_SHOWN = 2 * 10**9
"""Bytes of a rank from which on checking them takes so long that it shows."""


def check_run_folder(run: Run) -> None:
    """Check that the run can write to, or resume from, its output folder, and start from
    `checkpoint.load`.

    Nothing is written.

    Raises:
        InputError: no output folder is named; it is a file, cannot be written, is on a disk without
            room for one checkpoint, or holds something that no run wrote, or another architecture's
            checkpoints; `checkpoint.load` or `checkpoint.continue_from` is no checkpoint of this
            architecture; the latter's state does not fit this run; or a file of the checkpoint that
            it starts from is missing or cut short.
    """
    root = output_folder(run)
    check_writable("--output", root, folder=True)
    if (root / ARCHITECTURE_FILE).exists():
        _require_same_architecture(run, root, "checkpoint.output", "choose another --output")
    elif iteration_folders(root) or (root / TRACKER_FILE).exists():
        raise InputError(
            f"checkpoint.output={root}",
            rule=f"holds checkpoints without {ARCHITECTURE_FILE}, so this project did not write them",
            fix="choose another --output",
        )
    if (root / TRACKER_FILE).exists():
        find_checkpoint(
            root
        )  # a tracker that points nowhere would make Megatron start over without a word
    if run.checkpoint.load is not None:
        source = find_checkpoint(run.checkpoint.load)
        _require_same_architecture(
            run,
            source.root,
            "checkpoint.load",
            "load a checkpoint of this architecture",
            besides=ROTATION,
        )
    _check_continuation(run, root)
    start = _starting_point(run)
    if start is not None and run.checkpoint.verify != "off":
        check_sizes(start)
    _require_room(run, root)


def check_share(run: Run, *, rank: int, world_size: int) -> None:
    """Compare this rank's share of the checkpoint that the run starts from with its manifest
    (`checkpoint.verify`).

    Raises:
        InputError: a file has changed since it was written.
    """
    source = _starting_point(run)
    if source is None or run.checkpoint.verify != "hash":
        return
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, len(os.sched_getaffinity(0)) // local_ranks)
    total = bytes_to_check(source, part=rank, parts=world_size)
    if rank or total < _SHOWN:
        check_hashes(source, part=rank, parts=world_size, threads=threads)
        return
    from mellum2_megatron.common.byte_progress import byte_progress

    with byte_progress(f"checking {source.iteration_dir.name}", total) as advance:
        check_hashes(source, part=rank, parts=world_size, threads=threads, advance=advance)


def _starting_point(run: Run) -> CheckpointFolder | None:
    """Return the checkpoint that Megatron will load from: the run's own, else the one it goes on or
    starts from."""
    root = Path(resume_folder(str(run.checkpoint.output), run.checkpoint.continue_from))
    if (root / TRACKER_FILE).exists():
        return find_checkpoint(root)
    return None if run.checkpoint.load is None else find_checkpoint(run.checkpoint.load)


def _check_continuation(run: Run, root: Path) -> None:
    """Check that a run which goes on from another one's state (`checkpoint.continue_from`) fits
    that state."""
    given, first = run.checkpoint.continue_from, run.data.first_sample
    if (root / TRACKER_FILE).exists():
        return  # it resumes its own
    if given is None:
        if first:
            raise InputError(
                f"data.first_sample={first} in a run that starts at sample 0",
                rule="its data begin where another run ended",
                fix="name that run's folder as checkpoint.continue_from, or set data.first_sample=0",
            )
        return
    source = find_checkpoint(given)
    key = f"checkpoint.continue_from={given}"
    _require_same_architecture(
        run, source.root, "checkpoint.continue_from", "continue a run of this architecture"
    )
    if source.iteration is None or not (source.root / RUN_FILE).is_file():
        raise InputError(
            key,
            rule="holds weights without a run's state",
            fix="use checkpoint.load, or name a run's output folder",
        )
    if source.root != Path(os.path.abspath(given)):
        raise InputError(
            key,
            rule="a run continues the newest checkpoint of another",
            fix=f"use checkpoint.continue_from={source.root}",
        )
    before = read_run(source.root / RUN_FILE).schedule
    reached = before.samples(source.iteration)
    if run.schedule.samples(source.iteration) != reached:
        raise InputError(
            f"schedule.batch_schedule={list(map(list, run.schedule.batch_schedule))} with {key}",
            rule=f"step {source.iteration} there is sample {reached}, here {run.schedule.samples(source.iteration)}",
            fix=f"use schedule.batch_schedule={list(map(list, before.batch_schedule))}",
        )
    if reached < first:
        raise InputError(
            f"data.first_sample={first} with {key}",
            rule=f"that run has reached sample {reached} (step {source.iteration}) only",
            fix=f"let it train on until schedule.train_samples={before.train_samples}"
            if reached < before.train_samples
            else f"set data.first_sample={reached}",
        )


def checkpoint_bytes(run: Run) -> int:
    """Return the size of one of the run's checkpoints, in bytes: its tensors, without the files'
    own bookkeeping.

    A weight is stored in BF16 and as FP32 master; matrices under Muon have a momentum beside them,
    everything else Adam's two moments, all FP32.
    """
    total = 0
    for parameter in run.architecture.parameters():
        total += parameter.numel * (10 if run.optimizer.uses_muon(parameter) else 14)
    return total


def write_run_folder(run: Run) -> None:
    """Write `run.yaml`, `architecture.json` and `tokenizer/` into the output folder, each at once
    or not at all."""
    root = output_folder(run)
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / RUN_FILE, to_yaml(run))
    write_architecture(root, run.architecture)
    with atomic_directory(root / TOKENIZER_FOLDER, overwrite=True) as folder:
        copy_tokenizer(Path(run.data.tokenizer_folder), folder)


def read_run(path: Path) -> Run:
    """Read a resolved run.

    Raises:
        InputError: no such file, or not a resolved run.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"run file {path}", rule=f"cannot be read ({error})", fix="name a run.yaml"
        ) from None
    try:
        return from_yaml(text)
    except InputError as error:
        raise InputError(f"{path}: {error.value}", rule=error.rule, fix=error.fix) from None


def output_folder(run: Run) -> Path:
    """Return the folder of the run.

    Raises:
        InputError: the run names none.
    """
    if run.checkpoint.output is None:
        raise InputError(
            "checkpoint.output=null",
            rule="a run writes its checkpoints somewhere",
            fix="give --output DIR",
        )
    return Path(run.checkpoint.output)


def _require_room(run: Run, root: Path) -> None:
    place, needed = existing_ancestor(root), checkpoint_bytes(run)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"--output {root}",
            rule=f"its disk ({place}) has {size_text(free)} free, one checkpoint of this run takes {size_text(needed)}",
            fix="free space, or name a folder on another disk",
        )


def _require_same_architecture(
    run: Run, root: Path, key: str, fix: str, *, besides: Sequence[str] = ()
) -> None:
    there, here = read_architecture(root).to_dict(), run.architecture.to_dict()
    differing = [
        f"{name}: {there[name]!r} there, {here[name]!r} here"
        for name in here
        if there[name] != here[name] and name not in besides
    ]
    if differing:
        raise InputError(
            f"{key}={root}",
            rule="holds another architecture (" + "; ".join(differing) + ")",
            fix=fix,
        )
