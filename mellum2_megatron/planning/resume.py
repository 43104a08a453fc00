"""Differences between a run and the one whose state it takes over: settings, data, rate."""

from __future__ import annotations

from dataclasses import dataclass

from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.checkpoint.data_record import DataRecord
from mellum2_megatron.checkpoint.resume_keys import Change
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class RateJump:
    """A rise of the learning rate at a resume that the former schedule did not have.

    Attributes:
        sample: samples done.
        last: rate of the last step.
        planned: highest rate that the former schedule has from there on.
        highest: highest rate that the run has from there on.
        changes: changed keys of the schedule.
    """

    sample: int
    last: float
    planned: float
    highest: float
    changes: tuple[Change, ...]


def rate_jump(run: Run, start: StartingPoint) -> RateJump | None:
    """Return the rise of the learning rate at a resume; None without one."""
    before, sample, step = start.before, start.samples, start.step
    changes = tuple(change for change in start.changes(run) if change.key.startswith("schedule."))
    if before is None or not sample or not step or not changes:
        return None
    last = before.learning_rate(before.schedule.samples(step - 1))
    planned, highest = (
        one.schedule.highest_rate(sample, peak=one.optimizer.lr, minimum=one.optimizer.min_lr)
        for one in (before, run)
    )
    if highest <= max(last, planned) * (1 + 1e-9):
        return None
    return RateJump(sample=sample, last=last, planned=planned, highest=highest, changes=changes)


def data_changes(run: Run, start: StartingPoint) -> tuple[Change, ...]:
    """Return the changes in the content of the data since the checkpoint of a run's state."""
    from mellum2_megatron.data.feed.sources import check_data

    if not start.has_state or start.checkpoint is None:
        return ()
    recorded = DataRecord.read(start.checkpoint.iteration_dir)
    return () if recorded is None else recorded.changes(DataRecord.of(check_data(run)))


def is_done(run: Run, start: StartingPoint) -> bool:
    """Return true if the run's own checkpoint has all of its samples.

    Megatron would end with an assertion (training/datasets/data_samplers.py:145).

    Raises:
        InputError: the run continues another one that has seen as many samples.
    """
    total = run.schedule.train_samples
    if start.samples is None or start.samples < total:
        return False
    if start.kind == "continue":
        raise InputError(
            f"schedule.train_samples={total}",
            rule=f"nothing is left to train: {start.folder} has seen {start.samples:,} samples, "
            "and a run that continues it counts from there",
            fix="give more samples in all",
        )
    return True


def resume_lines(run: Run, start: StartingPoint) -> list[str]:
    """Return what a resumed or continued run prints about a rise of its rate, and about its end."""
    lines = []
    jump = rate_jump(run, start)
    if jump is not None:
        lines.append(
            f"the learning rate rises at sample {jump.sample}: {jump.last:.3g} in the last step, "
            f"up to {jump.highest:.3g} from here (schedule.rewarm_at={jump.sample})"
        )
    if is_done(run, start):
        lines.append(
            f"nothing is left to train: all {run.schedule.train_samples:,} samples are done"
        )
    return lines
