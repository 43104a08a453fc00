"""Refusal of runs that differ in more than their arms say: their difference answers nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ablations.answering.run_measures import RunMeasures
from ablations.asking.deciding import deciding_values
from ablations.asking.study import Arm, Scale, Study
from mellum2_megatron.common.errors import InputError, shown
from mellum2_megatron.config import apply_overrides

_BY_SEED = ("seed", "data.seed")
"""Keys that may differ between two seeds of an arm."""

_FOLLOWS = {
    "architecture.num_hidden_layers": ("architecture.layer_types", "architecture.mlp_layer_types"),
    "architecture.num_mtp_layers": ("architecture.mtp_layer_types", "architecture.mlp_layer_types"),
}
"""Key of an override -> keys that `Mellum2Architecture.replace` changes with it."""

_DATA = ("data.train", "data.valid", "tokenizer")
"""Parts of a task's identity that an arm with data of its own changes."""


def check_comparable(study: Study, scale: Scale, runs: Sequence[RunMeasures]) -> None:
    """Refuse runs that differ in more than the overrides of their arms, or lack these.

    Every run is compared with the control's of its seed, or where there is none with the control's
    first run. Keys of the run file, and contents of the data, count.

    Raises:
        InputError: two runs differ in another key, or the study has changed since a run of it; the
            message names the key.
    """
    for run in runs:
        _check_arm(study, scale, run)
    controls = {run.seed: run for run in runs if run.arm == study.control}
    if not controls:
        return
    first = controls[min(controls)]
    for run in runs:
        control = controls.get(run.seed, first)
        keys = _changed_keys(study, scale, run.arm)
        if control.seed != run.seed or run.arm == study.control:
            control = first
            keys |= set(_BY_SEED)
        before, after = _values(control), _values(run)
        for key in dict.fromkeys([*before, *after]):
            if before.get(key) != after.get(key) and not _covered(key, keys):
                raise InputError(
                    f"{run.arm} seed {run.seed} against {control.arm} seed {control.seed}: "
                    f"{key} {shown(before.get(key))} -> {shown(after.get(key))}",
                    rule="runs are compared that differ in the keys of their arms alone",
                    fix="run the study again in one state, in another results folder",
                )


def _check_arm(study: Study, scale: Scale, run: RunMeasures) -> None:
    """Refuse a run without the values of its arm: the study's file has changed since."""
    words = study.arm(run.arm).words(scale)
    keys = {word.partition("=")[0].strip() for word in words}
    before = deciding_values(run.run)
    after = deciding_values(apply_overrides(run.run, words))
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key) and _covered(key, keys):
            raise InputError(
                f"{run.arm} seed {run.seed}: {key} is {shown(before.get(key))} in its run, "
                f"{shown(after.get(key))} in the study",
                rule="a run has the values that its arm states",
                fix="undo the change of the study, or run it in another results folder",
            )


def _changed_keys(study: Study, scale: Scale, arm: str) -> set[str]:
    """Return the keys in which an arm may differ from the control."""
    keys: set[str] = set()
    for one in (study.arm(arm), study.arm(study.control)):
        for word in one.words(scale):
            key = word.partition("=")[0].strip()
            keys |= {key, *_FOLLOWS.get(key, ())}
        if _has_data(one):
            keys |= {"data", *(f"identity: {part}" for part in _DATA)}
    return keys


def _has_data(arm: Arm) -> bool:
    return bool(arm.data)


def _covered(key: str, keys: set[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _values(run: RunMeasures) -> dict[str, Any]:
    """Return the values of a run that count, by full key, and the contents of its data."""
    identity: Mapping[str, str] = run.task.record.identity
    contents = {f"identity: {part}": identity[part] for part in _DATA if part in identity}
    return {**deciding_values(run.run), **contents}
