"""Learning rate and batch size over a run, counted in samples (packed sequences) as in Megatron.

Samples, not steps: a point of the training keeps its sample count when the batch size changes.
Megatron's iteration-based learning-rate arguments are wrong under a batch ramp. It multiplies them
by ``micro_batch_size * dp`` instead of the real batch (megatron/training/arguments.py:684-686 and
training.py:1911-1922, 0.19.2).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Literal, Self

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import (
    INT32_MAX,
    INT64_MAX,
    check_fields,
    require,
    require_not_negative,
    require_positive,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Warmup, hold and decay of the learning rate, and the ramp of the batch.

    Attributes:
        style: ``whd`` (default): linear warmup, hold, linear decay (report §3; Megatron's WSD with
            linear decay). ``cosine``: decay from the end of the warmup to the horizon (report
            §5.1).
        train_samples: sample count at which the run ends, counted over the whole training, earlier
            phases included. It must be the end of a step.
        horizon_samples: sample count at which the learning-rate schedule ends; None (default):
            ``train_samples``. A run that is one phase of a longer training stops before it.
        warmup_samples: length of the linear warmup from 0 to the peak, default 0.
        decay_samples: length of the ``whd`` decay, which ends at the horizon; default 0.
        batch_schedule: ``(first sample, sequences a step)`` pairs; a single pair is a constant
            batch. A size applies from the first step that starts at or after its sample.
        micro_batch_size: sequences of one forward pass of a rank, default 1.
        rewarm_at: sample count at which a resume may raise the learning rate above the last one
            used; None (default): such a resume is refused.

    Raises:
        InputError: lengths that do not fit into each other, or ``train_samples`` between two steps.
    """

    style: Literal["whd", "cosine"] = "whd"
    train_samples: int
    horizon_samples: int | None = None
    warmup_samples: int = 0
    decay_samples: int = 0
    batch_schedule: tuple[tuple[int, int], ...]
    micro_batch_size: int = 1
    rewarm_at: int | None = None

    def __post_init__(self) -> None:
        check_fields("schedule", self)
        require_positive("schedule.train_samples", self.train_samples, most=INT64_MAX)
        require_positive("schedule.micro_batch_size", self.micro_batch_size)
        if self.rewarm_at is not None:
            require_not_negative(
                "schedule.rewarm_at", self.rewarm_at, fix="use null", most=INT64_MAX
            )
        self._check_batch_schedule()
        self._check_lengths()
        steps = self.steps(self.train_samples)
        before, after = self.samples(steps - 1), self.samples(steps)
        if after != self.train_samples:
            ends = [end for end in (before, after) if 0 < end <= INT64_MAX]
            raise InputError(
                f"schedule.train_samples={self.train_samples}",
                rule=f"a run ends after a whole step ({self.batch_size(before)} sequences there)",
                fix=f"use {' or '.join(str(end) for end in ends)}",
            )

    def _check_batch_schedule(self) -> None:
        given = f"schedule.batch_schedule={list(map(list, self.batch_schedule))}"
        starts = [start for start, _ in self.batch_schedule]
        require(
            bool(starts) and starts[0] == 0,
            given,
            rule="the first batch size starts at sample 0",
            fix="use [[0, SIZE], ...]",
        )
        require(
            all(earlier < later for earlier, later in itertools.pairwise(starts)),
            given,
            rule="first samples must increase",
            fix=f"sort them, for example {sorted(set(starts))}",
        )
        for start, size in self.batch_schedule:
            require(
                0 < size <= INT32_MAX,
                given,
                rule=f"the batch size from sample {start} on must be 1 to {INT32_MAX}",
                fix="use 1 or more",
            )

    def _check_lengths(self) -> None:
        warmup, decay, horizon = self.warmup_samples, self.decay_samples, self.lr_horizon
        require_not_negative(
            "schedule.warmup_samples", warmup, fix="use 0 for none", most=INT64_MAX
        )
        require_not_negative("schedule.decay_samples", decay, fix="use 0 for none", most=INT64_MAX)
        require(
            self.train_samples <= horizon,
            f"schedule.train_samples={self.train_samples}",
            rule=f"must not exceed schedule.horizon_samples={horizon}, "
            "where the learning rate's schedule ends",
            fix=f"set schedule.horizon_samples to {self.train_samples} or more, or to null",
        )
        require(
            self.style == "whd" or not decay,
            f"schedule.decay_samples={decay} with schedule.style=cosine",
            rule="a cosine decays from the end of the warmup to the horizon",
            fix="set schedule.decay_samples=0",
        )
        # Without a decay one sample must remain after the warmup: the cosine divides by the number
        # of samples that do.
        room = horizon - decay if decay else horizon - 1
        require(
            warmup <= room,
            f"schedule.warmup_samples={warmup}, schedule.decay_samples={decay}",
            rule=f"warmup and decay must fit into the {horizon} samples of the schedule",
            fix="shorten them, for example "
            f"schedule.warmup_samples={min(warmup, horizon // 10)} "
            f"schedule.decay_samples={min(decay, horizon // 5)}",
        )

    @classmethod
    def from_steps(
        cls,
        *,
        train_steps: int,
        batch_sizes: tuple[tuple[int, int], ...],
        warmup_steps: int = 0,
        decay_steps: int = 0,
        micro_batch_size: int = 1,
        style: Literal["whd", "cosine"] = "whd",
    ) -> Self:
        """Build a schedule from lengths in optimizer steps, as reports give them.

        Args:
            train_steps: steps of the whole run, warmup and decay included.
            batch_sizes: ``(first step, sequences a step)`` pairs.
            warmup_steps: length of the warmup, default 0. The warmup is linear in samples, so in
                steps only if the batch is constant during it.
            decay_steps: length of the decay at the end of the run, default 0.
            micro_batch_size, style: see `Schedule`.
        """
        require_positive("train_steps", train_steps)
        require(
            bool(batch_sizes),
            "batch_sizes=()",
            rule="a schedule has one batch size or more",
            fix="use ((0, SIZE),)",
        )
        # A size starts at the sample that all sizes before it have consumed.
        starts, samples = [], 0
        for index, (step, size) in enumerate(batch_sizes):
            starts.append((samples, size))
            if index + 1 < len(batch_sizes):
                samples += (batch_sizes[index + 1][0] - step) * size
        counted = _Steps(tuple(starts))
        total = counted.samples(train_steps)
        return cls(
            style=style,
            train_samples=total,
            warmup_samples=counted.samples(warmup_steps),
            # A difference of two counts: the steps of the decay have the batch size of the end.
            decay_samples=total - counted.samples(train_steps - decay_steps),
            batch_schedule=tuple(starts),
            micro_batch_size=micro_batch_size,
        )

    @property
    def lr_horizon(self) -> int:
        """Sample count at which the learning-rate schedule ends."""
        return self.train_samples if self.horizon_samples is None else self.horizon_samples

    @property
    def train_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.steps(self.train_samples)

    @property
    def final_batch_size(self) -> int:
        """Sequences of the run's last step."""
        return self.batch_size(self.train_samples - 1)

    def batch_size(self, sample: int) -> int:
        """Return the sequences of the step that starts after ``sample`` samples."""
        return _Steps(self.batch_schedule).size(sample)

    def steps(self, samples: int) -> int:
        """Return the fewest steps that consume at least ``samples`` samples."""
        return _Steps(self.batch_schedule).steps(samples)

    def samples(self, steps: int) -> int:
        """Return the samples that the first ``steps`` steps consume."""
        return _Steps(self.batch_schedule).samples(steps)

    def after(self, done: Schedule, reached: int) -> Schedule:
        """Return this schedule for a run that has trained ``reached`` samples by another one.

        Steps done keep the batches that they had, so that a step count names a sample count. The
        batches of this schedule begin at ``reached``. A schedule with those batches returns itself.

        Args:
            done: schedule of the steps done.
            reached: samples done, the end of a step of ``done``.

        Raises:
            InputError: this schedule's ``train_samples`` is below ``reached``, or not the end of a
                step any more.
        """
        past = [(start, size) for start, size in done.batch_schedule if start < reached]
        to_come = [(start, size) for start, size in self.batch_schedule if start > reached]
        size = self.batch_size(reached)
        joined = tuple(past + ([] if past[-1][1] == size else [(reached, size)]) + to_come)
        if self.train_samples < reached:
            raise InputError(
                f"schedule.train_samples={self.train_samples}",
                rule=f"the checkpoint has {reached} samples already",
                fix=f"use {reached + size} or more, or another --output",
            )
        try:
            return dataclasses.replace(self, batch_schedule=joined)
        except InputError as error:
            raise InputError(
                error.value,
                rule=f"{error.rule}, counted from the {reached} samples done on",
                fix=f"{error.fix}, with schedule.batch_schedule="
                f"{str(list(map(list, joined))).replace(' ', '')}",
            ) from None

    def highest_rate(self, first: int, *, peak: float, minimum: float) -> float:
        """Return the highest learning rate of the steps from sample ``first`` to the run's end.

        0 without such steps.
        """
        if first >= self.train_samples:
            return 0.0
        # It only falls after the warmup.
        last = self.train_samples - self.final_batch_size
        top = max(first, min(self.warmup_samples, last))
        return max(
            self.learning_rate(sample, peak=peak, minimum=minimum) for sample in (first, top)
        )

    def learning_rate(self, sample: int, *, peak: float, minimum: float) -> float:
        """Return the learning rate of the step that starts after ``sample`` samples.

        The operations are those of Megatron's ``OptimizerParamScheduler.get_lr``
        (megatron/core/optimizer_param_scheduler.py, 0.19.2) in the same order, so results are equal
        to the last bit. The first step of a warmup has rate 0.
        """
        # Factors of 1.0 and float() look idle, but they are Megatron's and decide the last bit.
        if self.warmup_samples > 0 and sample <= self.warmup_samples:
            return peak * float(sample) / float(self.warmup_samples)
        if sample > self.lr_horizon:
            return minimum
        if self.style == "cosine":
            decay_length = self.lr_horizon - self.warmup_samples
            ratio = float(sample - self.warmup_samples) / float(decay_length)
            return minimum + 0.5 * (math.cos(math.pi * ratio) + 1.0) * (peak - minimum)
        decay_start = self.lr_horizon - self.decay_samples
        if sample <= decay_start:
            return minimum + 1.0 * (peak - minimum)
        ratio = float(sample - decay_start) / float(self.decay_samples)
        return minimum + (1.0 - ratio) * (peak - minimum)


@dataclass(frozen=True, slots=True)
class _Steps:
    """Conversion between steps and samples for one batch schedule.

    A class of its own, because `Schedule.from_steps` counts before it has a valid `Schedule`.
    """

    schedule: tuple[tuple[int, int], ...]

    def size(self, sample: int) -> int:
        """Return the sequences of the step that starts after ``sample`` samples."""
        current = self.schedule[0][1]
        for start, size in self.schedule:
            if sample >= start:
                current = size
        return current

    def steps(self, samples: int) -> int:
        """Return the fewest steps that consume at least ``samples`` samples."""
        consumed = steps = 0
        ends = [start for start, _ in self.schedule[1:]] + [samples]
        for (_, size), end in zip(self.schedule, ends, strict=True):
            # The last step of a size may run past the start of the next size.
            count = max(0, -((consumed - min(end, samples)) // size))
            steps, consumed = steps + count, consumed + count * size
        return steps

    def samples(self, steps: int) -> int:
        """Return the samples that the first ``steps`` steps consume."""
        consumed = taken = 0
        for index, (_, size) in enumerate(self.schedule):
            count = steps - taken
            if index + 1 < len(self.schedule):
                room = self.schedule[index + 1][0] - consumed
                # A size has no step at all if the step before it ran past its range.
                count = min(count, max(0, -(-room // size)))
            taken, consumed = taken + count, consumed + count * size
        return consumed
