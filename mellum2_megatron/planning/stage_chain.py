"""Stages that follow each other: each a run of its own, which goes on from the one before it.

`stage_chain` resolves them together, for a launcher that submits all of them at once;
`check_predecessor` looks for what a single stage goes on from. No torch: both run on a login node.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.checkpoint.folder import ROTATION, names_checkpoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run
from mellum2_megatron.planning.rules import FROM_CHECKPOINT
from mellum2_megatron.recipes import recipe, recipe_names

_SHAPE = ("style", "horizon_samples", "warmup_samples", "decay_samples", "batch_schedule")


def stage_chain(stages: Sequence[str | Run], *, root: Path) -> tuple[Run, ...]:
    """Return the stages as runs whose folders lie in ``root``, each going on from the former's.

    Args:
        stages: names of recipes, or runs (with overrides applied), in the order in which they run.
            All but the first go on from another run (`checkpoint.continue_from` or
            `checkpoint.load`); which one is set here.
        root: folder of the runs' folders, which have the runs' names.

    Raises:
        InputError: an unknown recipe, two stages of one name, a stage that starts anew, or two that
            do not follow: data or schedule that begin elsewhere, another architecture or optimizer.
    """
    runs = [recipe(stage) if isinstance(stage, str) else stage for stage in stages]
    if not runs:
        raise InputError(
            "no stages", rule="a chain has one or more", fix="name recipes, see `mellum2 recipes`"
        )
    for number, run in enumerate(runs):
        if run.name in [earlier.name for earlier in runs[:number]]:
            raise InputError(
                f"stage {run.name}",
                rule="is in the chain twice, and would find its own folder",
                fix="name it once",
            )
    chain = [_placed(runs[0], root)]
    for before, after in itertools.pairwise(runs):
        _require_following(before, after)
        folder = str(root / before.name)
        if after.checkpoint.continue_from is not None:
            rewired = dataclasses.replace(after.checkpoint, continue_from=folder)
        else:
            rewired = dataclasses.replace(after.checkpoint, load=folder)
        chain.append(_placed(dataclasses.replace(after, checkpoint=rewired), root))
    return tuple(chain)


def check_predecessor(run: Run, start: StartingPoint) -> None:
    """Check that the run whose state or weights a stage takes is there and finished.

    A run that resumes its own folder needs nothing else. Do not check the later stages of a chain
    before it runs: their predecessors have no checkpoint yet.

    Args:
        run: the stage.
        start: its starting point.

    Raises:
        InputError: there is no checkpoint, or the run that wrote it is not finished.
    """
    if start.kind in ("new", "resume"):
        return
    assert start.folder is not None
    setting = "continue_from" if start.kind == "continue" else "load"
    key = f"checkpoint.{setting}={getattr(run.checkpoint, setting)}"
    if not names_checkpoint(start.folder):
        name = start.folder.name
        first = f"train {name} first, or " if name in recipe_names() else ""
        raise InputError(
            key,
            rule=f"{run.name} starts from that run, and there is no checkpoint of it",
            fix=f"{first}name the folder where it is: checkpoint.{setting}=DIR",
        )
    checkpoint = start.require_checkpoint()
    if start.names_iteration:
        return  # one checkpoint of an unfinished run may be taken on purpose
    if start.before_error is not None:
        raise start.before_error
    step, before = checkpoint.iteration, start.before
    if before is None or step is None:
        return  # an import is finished by itself
    reached = before.schedule.samples(step)
    if reached >= (
        run.data.first_sample if start.kind == "continue" else before.schedule.train_samples
    ):
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


def _placed(run: Run, root: Path) -> Run:
    return dataclasses.replace(
        run, checkpoint=dataclasses.replace(run.checkpoint, output=str(root / run.name))
    )


def _require_following(before: Run, after: Run) -> None:
    """Check that ``after`` goes on where ``before`` ends."""
    checkpoint = after.checkpoint
    if checkpoint.continue_from is not None and checkpoint.load is not None:
        raise _broken(
            before,
            after,
            "names both checkpoint.load and checkpoint.continue_from",
            "set one to null",
        )
    if checkpoint.continue_from is not None:
        _require_continuation(before, after)
    elif checkpoint.load is not None:
        _require_weights(before, after)
    else:
        raise _broken(
            before,
            after,
            "starts anew: checkpoint.continue_from and checkpoint.load are null",
            f"set checkpoint.continue_from={before.name} to go on with all of its state, or checkpoint.load="
            f"{before.name} to take its weights only",
        )


def _require_continuation(before: Run, after: Run) -> None:
    if after.architecture != before.architecture:
        names = ", ".join(_differing(before.architecture, after.architecture))
        raise _broken(
            before,
            after,
            f"has another architecture ({names})",
            "use one, or checkpoint.load for weights",
        )
    ends, first = before.schedule.train_samples, after.data.first_sample
    if first not in (0, ends):
        raise _broken(
            before, after, f"has data that begin at sample {first:,}; the former ends at {ends:,}",
            f"set data.first_sample={ends} in {after.name}, or schedule.train_samples={first} in {before.name}",
        )  # fmt: skip
    if after.schedule.train_samples <= ends:
        raise _broken(
            before, after, f"ends at sample {after.schedule.train_samples:,}; the former ends at {ends:,}",
            f"set schedule.train_samples of {after.name} above that",
        )  # fmt: skip
    for name in _SHAPE:
        there, here = (
            run.schedule.lr_horizon if name == "horizon_samples" else getattr(run.schedule, name)
            for run in (before, after)
        )
        if there != here:
            raise _broken(
                before, after, f"has schedule.{name}={_text(here)}; the former has {_text(there)}",
                f"give both the same: one training has one schedule, and a phase ends at schedule.train_samples "
                f"before schedule.horizon_samples={max(before.schedule.lr_horizon, after.schedule.lr_horizon)}",
            )  # fmt: skip
    for name in ("name", *FROM_CHECKPOINT):
        old, new = getattr(before.optimizer, name), getattr(after.optimizer, name)
        if old != new:
            raise _broken(
                before, after, f"has optimizer.{name}={new}; the former has {old}",
                "give both the same: the optimizer's state goes with its settings",
            )  # fmt: skip


def _require_weights(before: Run, after: Run) -> None:
    names = [
        name for name in _differing(before.architecture, after.architecture) if name not in ROTATION
    ]
    if names:
        raise _broken(
            before, after, f"has another architecture ({', '.join(names)})",
            f"let them differ in {', '.join(ROTATION)} only, which have no weights",
        )  # fmt: skip
    if after.data.first_sample:
        raise _broken(
            before, after, f"takes weights only, and has data.first_sample={after.data.first_sample:,}",
            "set data.first_sample=0: its training begins anew",
        )  # fmt: skip


def _differing(there: Mellum2Architecture, here: Mellum2Architecture) -> list[str]:
    one, other = there.to_dict(), here.to_dict()
    return [name for name in one if one[name] != other[name]]


def _text(value: object) -> str:
    return str([list(pair) for pair in value]) if isinstance(value, tuple) else str(value)


def _broken(before: Run, after: Run, what: str, fix: str) -> InputError:
    return InputError(f"stage {after.name} after {before.name}", rule=what, fix=fix)
