"""Stages of one training: runs that each start from the one before.

`stage_chain` resolves all of them, for a launcher that submits them at once. `check_predecessor`
checks the run that a single stage starts from. No torch: both run on a login node.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.checkpoint.checks import check_loaded
from mellum2_megatron.checkpoint.folder import ROTATION, names_checkpoint
from mellum2_megatron.checkpoint.resume_keys import changes
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.model_folders import kind_of, not_checkpoint
from mellum2_megatron.config import Run
from mellum2_megatron.recipes import recipe, recipe_names


def stage_chain(stages: Sequence[str | Run], *, root: Path) -> tuple[Run, ...]:
    """Return the stages as runs with folders in ``root``, each starting from the one before it.

    Args:
        stages: names of recipes, or runs with overrides applied, in order. Each except the first
            must continue another run (`checkpoint.continue_from`) or take its weights
            (`checkpoint.load`); the folder of the stage before replaces that setting.
        root: parent of the runs' folders. A folder has the name of its run.

    Raises:
        InputError: an unknown recipe, two stages of one name, a stage that starts anew, or a stage
            whose data, schedule, architecture or optimizer do not fit the one before.
    """
    runs = [recipe(stage) if isinstance(stage, str) else stage for stage in stages]
    if not runs:
        raise InputError(
            "no stages", rule="a chain has one or more", fix="name recipes, see `mellum2 recipes`"
        )
    for index, run in enumerate(runs):
        if run.name in [earlier.name for earlier in runs[:index]]:
            # A folder has the name of its run, so the two would share one.
            raise InputError(
                f"stage {run.name}",
                rule="is in the chain twice, and would find its own folder",
                fix="name it once",
            )
    for before, after in itertools.pairwise(runs):
        for rule, fix in _problems(before, after):
            raise InputError(f"stage {after.name} after {before.name}", rule=rule, fix=fix)

    chain = []
    previous: str | None = None
    for run in runs:
        checkpoint = dataclasses.replace(run.checkpoint, output=str(root / run.name))
        # The first stage keeps its own setting: a chain may begin in the middle of the training.
        if previous is not None and checkpoint.continue_from is not None:
            checkpoint = dataclasses.replace(checkpoint, continue_from=previous)
        elif previous is not None:
            checkpoint = dataclasses.replace(checkpoint, load=previous)
        chain.append(dataclasses.replace(run, checkpoint=checkpoint))
        previous = checkpoint.output
    return tuple(chain)


def check_predecessor(run: Run, start: StartingPoint | None = None) -> None:
    """Check that the run that a stage starts from has a checkpoint and is finished.

    A stage that resumes its own folder passes. Do not check the later stages of a chain before it
    runs: their predecessors have no checkpoint yet.

    Args:
        run: the stage.
        start: its starting point, default `StartingPoint.of(run)`.

    Raises:
        InputError: there is no checkpoint, or the run that wrote it is not finished.
    """
    if start is None:
        start = StartingPoint.of(run)
    if start.kind in ("new", "resume"):
        return
    assert start.folder is not None
    setting = "continue_from" if start.kind == "continue" else "load"
    key = f"checkpoint.{setting}={getattr(run.checkpoint, setting)}"
    if not names_checkpoint(start.folder):
        mistaken = not_checkpoint(start.folder)
        if mistaken is not None and kind_of(start.folder) not in ("missing", "unknown", "run"):
            fix = mistaken.fix
            if start.kind == "continue" and kind_of(start.folder) == "huggingface":
                fix = f"use checkpoint.load={start.folder}: it has weights, and no run's state"
            raise InputError(key, rule=mistaken.rule, fix=fix)
        name = start.folder.name
        first = f"train {name} first, or " if name in recipe_names() else ""
        raise InputError(
            key,
            rule=f"{run.name} starts from that run, and there is no checkpoint of it",
            fix=f"{first}name the folder where it is: checkpoint.{setting}=DIR",
        )
    checkpoint = start.require_checkpoint()
    if start.names_iteration:
        return  # naming one checkpoint means it, finished run or not
    if start.before_error is not None:
        raise start.before_error
    step, before = checkpoint.iteration, start.before
    if before is None or step is None:
        return  # an import has no run behind it that could be unfinished
    reached = before.schedule.samples(step)
    # A continuation needs all samples before its own data; weights are taken where their run ends.
    needed = run.data.first_sample if start.kind == "continue" else before.schedule.train_samples
    if reached >= needed:
        return
    fix = "continue it to the end, with the command that started it"
    if start.kind == "weights":
        fix += f", or start from it as it is: checkpoint.load={checkpoint.iteration_dir}"
    raise InputError(
        key,
        rule=f"{before.name} is at step {step} of {before.schedule.train_steps}: "
        "it is not finished",
        fix=fix,
    )


def check_start(run: Run, overrides: Sequence[str]) -> str | None:
    """Check what a run loads, as its start would, for a plan that starts nothing.

    A checkpoint that the command names must be there. One that a recipe or a run file names may be
    on another machine, or not made yet, so its fault is told and not raised.

    Args:
        run: a resolved run.
        overrides: ``key=value`` words of the command.

    Returns:
        The fault in one line, or None.

    Raises:
        InputError: the command names a checkpoint that the run cannot start from.
    """
    start = StartingPoint.of(run)
    if start.kind in ("new", "resume"):
        return None
    key = "checkpoint.continue_from" if start.kind == "continue" else "checkpoint.load"
    try:
        check_predecessor(run, start)
        check_loaded(run, start)
    except InputError as error:
        if any(word.partition("=")[0].strip() == key for word in overrides):
            raise
        return f"would be refused now: {error}"
    return None


def _problems(before: Run, after: Run) -> Iterator[tuple[str, str]]:
    """Yield rule and fix of each reason why ``after`` does not start where ``before`` ends."""
    load, continue_from = after.checkpoint.load, after.checkpoint.continue_from
    if continue_from is not None and load is not None:
        yield "names both checkpoint.load and checkpoint.continue_from", "set one to null"
    elif continue_from is not None:
        yield from _continuation_problems(before, after)
    elif load is not None:
        differing = _differing_fields(before.architecture, after.architecture)
        refused = [name for name in differing if name not in ROTATION]
        if refused:
            yield (
                f"has another architecture ({', '.join(refused)})",
                f"let them differ in {', '.join(ROTATION)} only, which have no weights",
            )
        # Step and sample count start anew with weights alone, and so do the data.
        first = after.data.first_sample
        if first:
            yield (
                f"takes weights only, and has data.first_sample={first:,}",
                "set data.first_sample=0: its training begins anew",
            )
    else:
        yield (
            "starts anew: checkpoint.continue_from and checkpoint.load are null",
            f"set checkpoint.continue_from={before.name} to continue with all of its state, or "
            f"checkpoint.load={before.name} to take its weights only",
        )


def _continuation_problems(before: Run, after: Run) -> Iterator[tuple[str, str]]:
    """Yield rule and fix of each reason why ``after`` cannot take all state of ``before``."""
    differing = _differing_fields(before.architecture, after.architecture)
    if differing:
        yield (
            f"has another architecture ({', '.join(differing)})",
            "use one, or checkpoint.load for weights",
        )
    ends, first = before.schedule.train_samples, after.data.first_sample
    # 0 is allowed: one data stream over all phases, in which the sample count is the position.
    if first not in (0, ends):
        yield (
            f"has data that begin at sample {first:,}; the former ends at {ends:,}",
            f"set data.first_sample={ends} in {after.name}, "
            f"or schedule.train_samples={first} in {before.name}",
        )
    if after.schedule.train_samples <= ends:
        yield (
            f"ends at sample {after.schedule.train_samples:,}; the former ends at {ends:,}",
            f"set schedule.train_samples of {after.name} above that",
        )
    horizon = max(before.schedule.lr_horizon, after.schedule.lr_horizon)
    old_schedule, new_schedule = _schedule_shape(before), _schedule_shape(after)
    for name, old in old_schedule.items():
        new = new_schedule[name]
        if old != new:
            yield (
                f"has schedule.{name}={new}; the former has {old}",
                "give both the same: one training has one schedule, and a phase ends at "
                f"schedule.train_samples before schedule.horizon_samples={horizon}",
            )
    # In advance: the rule `resume-keeps-settings` needs a checkpoint, which is not there yet.
    for change in changes(before, after, phase=True):
        if change.kind == "fixed" and not change.key.startswith("architecture."):
            yield (
                f"has {change.key}={change.after}; the former has {change.before}",
                f"give both the same: {change.reason}",
            )


def _differing_fields(before: Mellum2Architecture, after: Mellum2Architecture) -> list[str]:
    old, new = before.to_dict(), after.to_dict()
    return [name for name in old if old[name] != new[name]]


def _schedule_shape(run: Run) -> dict[str, object]:
    """Return the fields that determine learning rate and batch size, in the form for messages."""
    schedule = run.schedule
    return {
        "style": schedule.style,
        # Resolved: null means the end of the run, which differs between phases.
        "horizon_samples": schedule.lr_horizon,
        "warmup_samples": schedule.warmup_samples,
        "decay_samples": schedule.decay_samples,
        "batch_schedule": list(map(list, schedule.batch_schedule)),
    }
