"""The figures of one run of a study, read from the files in its folder."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ablations.running.evaluations import EVALUATIONS
from ablations.running.results import TaskOnDisk
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.field_checks import require
from mellum2_megatron.common.machine_load import MachineLoad
from mellum2_megatron.common.provenance import read_records, recorded_code
from mellum2_megatron.config import Run
from mellum2_megatron.metrics import read_metrics
from mellum2_megatron.metrics.log import METRICS_FILE, Record, series
from mellum2_megatron.metrics.validation_sums import ValidationSums, read_sums, sums_files


@dataclass(frozen=True, kw_only=True, slots=True)
class RunMeasures:
    """One finished run.

    Attributes:
        task: the task and its folder.
        run: its run file.
        records: lines of its metrics.
        sums: sums by document of the last validation; None if it wrote none at its last step.
        commit: first digits of the commit of the code, ``+`` for uncommitted changes; ``unknown``.
        host: name of the machine of the last start; empty: unknown.
        load: load of the machine while it trained, of several starts the one with the largest share
            of others; None: unknown for a start.
        values: figure by name of `METRICS`, those that the files have.
        missing: reason why a metric has no figure, by its name.
    """

    task: TaskOnDisk
    run: Run
    records: Sequence[Record]
    sums: ValidationSums | None
    commit: str
    host: str
    load: MachineLoad | None
    values: Mapping[str, float]
    missing: Mapping[str, str]

    @property
    def arm(self) -> str:
        """Name of the arm."""
        return self.task.record.arm

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.task.record.seed

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of one token, forward and backward, with the MTP head."""
        return self.run.architecture.flops_per_token(self.run.data.sequence_length)

    def curve(self, name: str, *, valid: bool = False) -> tuple[list[float], list[float]]:
        """Return tokens consumed and values of a metric, over the logged steps."""
        steps, values = series(self.records, name, "valid" if valid else "train")
        schedule, length = self.run.schedule, self.run.data.sequence_length
        first = self.run.data.first_sample
        return [float((schedule.samples(step) - first) * length) for step in steps], values


def measure(task: TaskOnDisk) -> RunMeasures:
    """Read the figures of a task that is done.

    Raises:
        InputError: a file of the folder is missing, damaged or cut off.
    """
    folder = task.folder
    run = read_run(folder / RUN_FILE, warn=False)
    records = read_metrics(folder / METRICS_FILE)
    _check_complete(folder, run, records)
    files = sums_files(folder)
    last = files.get(run.schedule.train_steps)
    sums = None if last is None else read_sums(last)
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, (figure, reason) in _FIGURES.items():
        value = figure(run, records, sums)
        if value is None:
            missing[name] = reason
        else:
            values[name] = value
    for name, evaluation in EVALUATIONS.items():
        value = evaluation.value(folder)
        if value is None:
            missing[name] = "the run has no figure of it from `mellum2 ablate evaluate`"
        else:
            values[name] = value
    lines = read_records(folder)
    starts = [line for line in lines if line.get("event") == "start"]
    loads = [MachineLoad.of(line.get("load")) for line in lines if line.get("event") == "end"]
    known = [load for load in loads if load is not None]
    return RunMeasures(
        task=task,
        run=run,
        records=records,
        sums=sums,
        commit=_commit(folder),
        host=str(starts[-1].get("host", "")) if starts else "",
        load=max(known, key=lambda load: load.share_of_others)
        if len(known) >= len(starts) > 0
        else None,
        values=values,
        missing=missing,
    )


def _check_complete(folder: Path, run: Run, records: Sequence[Record]) -> None:
    """Refuse metrics that end before the run: their last tenth would be another one."""
    steps, interval = run.schedule.train_steps, run.logging.log_interval
    logged = max((record.step for record in records if record.kind == "train"), default=0)
    require(
        logged >= steps // interval * interval,
        str(folder / METRICS_FILE),
        rule=f"the task is done after {steps} steps, and step {logged} is the last in this file",
        fix="put the file back, or delete the folder and run the study again",
    )


def count_spikes(records: Sequence[Record]) -> int:
    """Return the number of steps whose loss was far above the median before it."""
    return sum(
        record.kind == "event" and "times the median of" in record.note for record in records
    )


def count_skips(records: Sequence[Record]) -> int:
    """Return the number of steps whose update was skipped."""
    return sum(record.kind == "event" and record.values.get("skipped") == 1 for record in records)


def _commit(folder: Path) -> str:
    codes = recorded_code(folder)
    names = [
        "unknown" if code.commit is None else code.commit[:10] + ("+" if code.dirty else "")
        for code in codes
    ]
    return ", ".join(dict.fromkeys(names)) or "unknown"


_Figure = Callable[[Run, Sequence[Record], "ValidationSums | None"], "float | None"]


def _last_tenth(values: Sequence[float]) -> float | None:
    kept = values[-max(1, len(values) // 10) :]
    return statistics.fmean(kept) if kept else None


def _of_train(name: str, summary: Callable[[Sequence[float]], float | None]) -> _Figure:
    def figure(run: Run, records: Sequence[Record], sums: ValidationSums | None) -> float | None:
        _, values = series(records, name)
        return summary(values) if values else None

    return figure


def _of_valid(name: str) -> _Figure:
    """Return the figure of the validation after the last step."""

    def figure(run: Run, records: Sequence[Record], sums: ValidationSums | None) -> float | None:
        steps, values = series(records, name, "valid")
        return values[-1] if steps and steps[-1] == run.schedule.train_steps else None

    return figure


def _valid_loss(run: Run, records: Sequence[Record], sums: ValidationSums | None) -> float | None:
    if sums is not None:
        return sums.loss
    return _of_valid("lm_loss")(run, records, sums)


def _bits(run: Run, records: Sequence[Record], sums: ValidationSums | None) -> float | None:
    return None if sums is None else sums.bits_per_byte


def _quarter(number: int) -> _Figure:
    def figure(run: Run, records: Sequence[Record], sums: ValidationSums | None) -> float | None:
        length = run.data.sequence_length
        if sums is None or length % 4:
            return None
        return sums.loss_between(number * length // 4, (number + 1) * length // 4)

    return figure


def _expert_load(run: Run, records: Sequence[Record], sums: ValidationSums | None) -> float | None:
    loads = []
    for record in records:
        layers = [
            value
            for name, value in record.values.items()
            if name.startswith("expert_load/") and name.endswith("/max_over_mean")
        ]
        if record.kind == "train" and layers:
            loads.append(statistics.fmean(layers))
    return _last_tenth(loads)


_NO_SUMS = "the run has no sums by document (logging.validation_documents)"
_FIGURES: Mapping[str, tuple[_Figure, str]] = {
    "valid_loss": (_valid_loss, "the run has no validation after its last step"),
    "valid_bits_per_byte": (_bits, _NO_SUMS),
    "train_loss": (_of_train("lm_loss", _last_tenth), "the run has logged no step"),
    "mtp_loss": (_of_train("mtp_loss", _last_tenth), "the run has no MTP head"),
    "mtp_acceptance": (_of_train("mtp_acceptance", _last_tenth), "the run has no MTP head"),
    "tokens_per_second": (
        _of_train("tokens_per_second", statistics.median),
        "the run has logged no step",
    ),
    "step_seconds": (
        _of_train("seconds_per_step", statistics.median),
        "the run has logged no step",
    ),
    "expert_load": (_expert_load, "the run has logged no load of experts"),
    "grad_norm": (_of_train("grad_norm", statistics.median), "the run has logged no step"),
    "spikes": (
        lambda run, records, sums: float(count_spikes(records)),
        "the run has no metrics",
    ),
    "loss_early": (_quarter(0), f"{_NO_SUMS}, or its length has no quarters"),
    "loss_late": (_quarter(3), f"{_NO_SUMS}, or no position in the last quarter"),
}
"""Name of a metric that a run logs -> its figure, and the reason where it has none."""
