"""Measures of finished tasks: `mellum2 eval` on each run folder, the result beside the run's files.

::

    RESULTS/STUDY/SCALE/ARM/seed_N/eval_needle.json
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ablations.asking.study import Study
from ablations.running.results import TaskOnDisk
from conversion.exportable import require_exportable_run
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.console import print_line
from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.json_files import load_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The source of a metric.

    Attributes:
        measure: measure of `mellum2 eval`.
        figure: name of the measure's figure; over several lengths their mean is taken.
    """

    measure: str
    figure: str

    def file(self, folder: Path) -> Path:
        """Return the file that `mellum2 eval` writes into a run folder."""
        return folder / f"eval_{self.measure}.json"

    def value(self, folder: Path) -> float | None:
        """Return the metric of a run; None without the file, or without the figure in it.

        Raises:
            InputError: the file is damaged.
        """
        file = self.file(folder)
        if not file.is_file():
            return None
        try:
            figures = [
                (float(figure["value"]), int(figure["items"]))
                for measure in load_json(file)["measures"]
                for figure in measure["figures"]
                if measure["name"] == self.measure and figure["name"] == self.figure
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                str(file),
                rule=f"is no result of `mellum2 eval` ({first_line(error)})",
                fix="remove it, and evaluate the study again",
            ) from None
        items = sum(count for _, count in figures)
        return sum(value * count for value, count in figures) / items if items else None


EVALUATIONS: Mapping[str, Evaluation] = {
    "needle": Evaluation(measure="needle", figure="preferred"),
    "fim_exact_match": Evaluation(measure="fim", figure="exact"),
}
"""Metric of a study -> the evaluation that it comes from."""


def evaluations_of(study: Study) -> list[Evaluation]:
    """Return the evaluations that a study's metrics come from."""
    names = [metric.name for metric in study.metrics]
    return [EVALUATIONS[name] for name in names if name in EVALUATIONS]


def eval_command(folder: Path, measure: str) -> list[str]:
    """Return the command that takes a measure of a run."""
    words = ["eval", str(folder), "--suite", measure]
    return [sys.executable, "-m", "mellum2_megatron", *words]


def evaluate_tasks(
    study: Study,
    tasks: Sequence[TaskOnDisk],
    *,
    command: Callable[[Path, str], Sequence[str]] = eval_command,
) -> Iterator[str]:
    """Take the measures of finished tasks that have none yet; yield what has failed.

    A task that Hugging Face's model cannot hold is left out, with a line that says so.

    Args:
        study: the study.
        tasks: its tasks.
        command: command of a folder and a measure, default `eval_command`.
    """
    for task in tasks:
        label = f"{task.record.arm} seed {task.record.seed}"
        missing = [one for one in evaluations_of(study) if not one.file(task.folder).is_file()]
        if task.record.state != "done" or not missing:
            continue
        try:
            require_exportable_run(read_run(task.folder / RUN_FILE, warn=False))
        except InputError as error:
            print_line(f"{label}: not evaluated, {error.value}: {error.rule}")
            continue
        for one in missing:
            print_line(f"{label}: {one.measure}")
            done = subprocess.run(command(task.folder, one.measure), check=False)
            if done.returncode:
                yield f"{label}: {one.measure} ended with exit code {done.returncode}"
