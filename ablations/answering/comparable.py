"""Refusal of runs that are not those of the study as it is now: their answer would be another's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablations.answering.run_measures import RunMeasures
from ablations.asking.deciding import deciding_values
from ablations.asking.planned import Plan
from ablations.asking.study import DataSet
from ablations.running.results import START
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.errors import InputError, shown
from mellum2_megatron.config import Run

_CONTENTS = ("data.train", "data.valid", "tokenizer")
"""Parts of a task's identity that arms with the same data set have in common."""


def check_comparable(plan: Plan, runs: Sequence[RunMeasures]) -> None:
    """Refuse runs that differ from their arms as planned now, in a run file or in their data.

    So two runs differ in the keys of their arms alone, and in those as the study states them: a
    changed base, `common`, arm or start is found, whichever runs it has reached.

    Args:
        plan: the study at its scale.
        runs: its finished runs.

    Raises:
        InputError: a run has another value than its arm; runs of one data set have other contents.
            The message names the key.
    """
    contents: dict[DataSet | None, RunMeasures] = {}
    for run in runs:
        arm = plan.arm(run.arm)
        _check_values(f"{run.arm} seed {run.seed}", run.run, arm.run, run.seed)
        if plan.start is not None:
            start = run.task.folder.resolve().parents[1] / START / f"seed_{run.seed}" / RUN_FILE
            _check_start(start, plan.start, run.seed)
        _check_contents(contents.setdefault(arm.data, run), run)


def _check_values(name: str, found: Run, planned: Run, seed: int) -> None:
    before = deciding_values(found)
    now: dict[str, Any] = deciding_values(planned) | {"seed": seed}
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            raise InputError(
                f"{name}: {key} is {shown(before.get(key))} in its run, {shown(now.get(key))} in "
                "the study",
                rule="a report compares runs of the study as it is now: its base, its `common`, "
                "its arms, and the seed of the folder",
                fix="undo the change of the study, or run it in another results folder",
            )


def _check_start(file: Path, planned: Run, seed: int) -> None:
    # Weights that every arm has started from may be deleted.
    if file.is_file():
        _check_values(f"{START} seed {seed}", read_run(file, warn=False), planned, seed)


def _check_contents(first: RunMeasures, run: RunMeasures) -> None:
    before, after = first.task.record.identity, run.task.record.identity
    for key in _CONTENTS:
        if before.get(key) != after.get(key):
            raise InputError(
                f"{run.arm} seed {run.seed} against {first.arm} seed {first.seed}: contents of "
                f"{key} {shown(before.get(key))} -> {shown(after.get(key))}",
                rule="arms that share a data set are compared on the same data",
                fix="run the study again on one state of its data, in another results folder",
            )
