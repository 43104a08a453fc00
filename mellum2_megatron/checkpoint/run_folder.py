"""Files of a run beside its checkpoints: run.yaml, architecture, tokenizer, a recipe's own file."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from mellum2_megatron.checkpoint.folder import (
    ARCHITECTURE_FILE,
    RUN_FILE,
    TOKENIZER_FOLDER,
    iteration_folder_name,
    tracked_iteration,
    write_architecture,
)
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import atomic_directory, read_text, write_text
from mellum2_megatron.common.provenance import read_records
from mellum2_megatron.config import Data, Run, from_yaml, to_yaml
from mellum2_megatron.data.feed.entries import tokenizer_folder
from mellum2_megatron.data.tokens.tokenizer import copy_tokenizer
from mellum2_megatron.recipes import recipe_origin

RECIPE_FILE = "recipe.py"
"""Copy of the user's file that the run's recipe is in; absent for a recipe of this project."""


HISTORY_FOLDER = "run_history"
"""Folder of the run files that a resume replaced, see `history_file`."""


def history_file(root: Path, step: int) -> Path:
    """Return the place of the run file that trained up to ``step`` and was changed there."""
    return root / HISTORY_FOLDER / f"step_{step:07d}.yaml"


def checkpoint_run_file(root: Path, iteration: int | None) -> Path | None:
    """Return the file of the run that made a checkpoint in ``root``; None without one.

    Args:
        root: folder of the checkpoints.
        iteration: step of the checkpoint; None: a release, or none.
    """
    files = [root / RUN_FILE]
    if iteration is not None:
        # Checkpoints of older versions hold no run; a start that changed it has kept theirs.
        inside = root / iteration_folder_name(iteration) / RUN_FILE
        files = [inside, history_file(root, iteration), *files]
    return next((file for file in files if file.is_file()), None)


def write_run_folder(run: Run) -> None:
    """Write `run.yaml`, `architecture.json` and `tokenizer/` into the output folder.

    If the run resumes a checkpoint that another run made, the file of that run is kept as
    `history_file`. A recipe in a file of the user's own is copied too, as `RECIPE_FILE`. Each of
    them is replaced in one step, so no reader finds it half-written.
    """
    root = output_folder(run)
    root.mkdir(parents=True, exist_ok=True)
    _leave_wandb_run_of_original(root)
    step = tracked_iteration(root)
    former = None if step is None else checkpoint_run_file(root, step)
    if step is not None and former is not None:
        text = read_text(former, f"run file {former}", fix="copy it again")
        kept = history_file(root, step)
        if text != to_yaml(run) and former != kept:
            kept.parent.mkdir(exist_ok=True)
            write_text(kept, text)
    # A resume replaces run.yaml too, so the file describes the latest start.
    write_text(root / RUN_FILE, to_yaml(run))
    write_architecture(root, run.architecture)
    with atomic_directory(root / TOKENIZER_FOLDER, overwrite=True) as folder:
        copy_tokenizer(tokenizer_folder(run.data), folder)
    _copy_recipe(run, root / RECIPE_FILE)


def read_run_in_place(path: Path) -> tuple[Run, str]:
    """Read a run file; one that lies in a run folder means that folder, wherever it is now.

    Relative paths of the data that are not found here are taken from the working directory of the
    run's last start, which its `provenance.jsonl` has.

    Returns:
        The run, and a line about what was changed in it; empty: nothing.

    Raises:
        InputError: see `read_run`.
    """
    run, folder = read_run(path), path.parent
    # Written beside every run.yaml by `write_run_folder`; a file of the user's own has none.
    if path.name != RUN_FILE or not (folder / ARCHITECTURE_FILE).is_file():
        return run, ""
    notes = []
    stored = run.checkpoint.output
    if stored is None or os.path.realpath(stored) != os.path.realpath(folder):
        notes.append(f"the run folder is {folder}, not {stored} as the file has it")
        checkpoint = dataclasses.replace(run.checkpoint, output=str(folder))
        run = dataclasses.replace(run, checkpoint=checkpoint)
    starts = [line["cwd"] for line in read_records(folder) if isinstance(line.get("cwd"), str)]
    if starts:
        data = _from_folder(run.data, Path(starts[-1]))
        if data != run.data:
            notes.append(f"data are read from {starts[-1]}, where the run was started")
            run = dataclasses.replace(run, data=data)
    return run, f"{path}: {'; '.join(notes)}" if notes else ""


def _from_folder(data: Data, base: Path) -> Data:
    """Return the data with relative paths that exist in ``base`` and not here made absolute."""

    def found(path: str) -> str:
        # A prefix is no file: its index is.
        exists = [
            any(Path(f"{place}{suffix}").exists() for suffix in ("", ".idx"))
            for place in (path, base / path)
        ]
        return str(base / path) if exists == [False, True] else path

    return dataclasses.replace(
        data,
        path=found(data.path),
        tokenizer=None if data.tokenizer is None else found(data.tokenizer),
        train=tuple((weight, found(path)) for weight, path in data.train),
        valid=tuple((weight, found(path)) for weight, path in data.valid),
    )


def read_run(path: Path, *, warn: bool = True) -> Run:
    """Read a resolved run.

    Args:
        path: the run file.
        warn: log each key that is younger than the file, default true.

    Raises:
        InputError: there is no such file, or it is not a resolved run.
    """
    text = read_text(path, f"run file {path}", fix="name a run.yaml")
    try:
        return from_yaml(text, warn=warn)
    except InputError as error:
        raise InputError(f"{path}: {error.value}", rule=error.rule, fix=error.fix) from None


def output_folder(run: Run) -> Path:
    """Return the folder that the run writes to.

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


def _leave_wandb_run_of_original(root: Path) -> None:
    """Drop the id in W&B of a copied run folder whose original is still there and has that id."""
    # Imports numpy, which planning does not need.
    from mellum2_megatron.metrics.log import WANDB_ID_FILE

    try:
        stored = read_run(root / RUN_FILE).checkpoint.output
        if stored is None or os.path.realpath(stored) == os.path.realpath(root):
            return
        ours, theirs = (folder / WANDB_ID_FILE for folder in (root, Path(stored)))
        if ours.read_bytes() == theirs.read_bytes():
            ours.unlink()
    except (OSError, InputError):
        return  # there is no id, no original, or no readable run


def _copy_recipe(run: Run, target: Path) -> None:
    """Copy the file of the run's recipe, unless it has changed since or is on another machine."""
    origin = recipe_origin(run)
    if origin is not None and _sha256(origin.path) == origin.sha256:
        write_text(target, origin.path.read_text(encoding="utf-8"))
    # A copy from an earlier start stays only if it is this start's file.
    elif origin is None or _sha256(target) != origin.sha256:
        target.unlink(missing_ok=True)


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
