"""Learning rate and batch size against Megatron's own scheduler and micro-batch calculator."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Schedule

WHD = Schedule(
    train_samples=640, warmup_samples=64, decay_samples=160, batch_schedule=((0, 8), (320, 16))
)
COSINE = Schedule(style="cosine", train_samples=640, warmup_samples=64, batch_schedule=((0, 8),))
SCHEDULES = {
    "whd": WHD,
    "whd_without_warmup": dataclasses.replace(WHD, warmup_samples=0),
    "whd_without_hold": dataclasses.replace(WHD, decay_samples=640 - 64),
    "warmup_and_hold_only": dataclasses.replace(WHD, decay_samples=0),
    "phase_of_a_longer_schedule": dataclasses.replace(WHD, train_samples=480, horizon_samples=640),
    "cosine": COSINE,
    "cosine_without_warmup": dataclasses.replace(COSINE, warmup_samples=0),
}


def megatron_scheduler(schedule: Schedule, peak: float, minimum: float) -> Any:
    """Return Megatron's scheduler, set up by hand with Megatron's own argument names."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    whd = schedule.style == "whd"
    return OptimizerParamScheduler(
        SimpleNamespace(param_groups=[{}]),
        init_lr=0.0,
        max_lr=peak,
        min_lr=minimum,
        lr_warmup_steps=schedule.warmup_samples,
        lr_decay_steps=schedule.horizon_samples or schedule.train_samples,
        lr_decay_style="WSD" if whd else "cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=schedule.train_samples,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.decay_samples if whd else None,
        lr_wsd_decay_style="linear" if whd else None,
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("peak", "minimum"), [(3e-4, 0.0), (3e-5, 3e-6)])
def test_learning_rate_equals_megatrons(name: str, peak: float, minimum: float) -> None:
    schedule = SCHEDULES[name]
    scheduler = megatron_scheduler(schedule, peak, minimum)
    for sample in range(700):
        scheduler.num_steps = sample
        assert schedule.learning_rate(sample, peak=peak, minimum=minimum) == scheduler.get_lr({}), (
            sample
        )


def test_whd_shape() -> None:
    rate = {
        sample: WHD.learning_rate(sample, peak=1.0, minimum=0.0)
        for sample in (0, 32, 64, 480, 560, 640)
    }
    assert rate == {0: 0.0, 32: 0.5, 64: 1.0, 480: 1.0, 560: 0.5, 640: 0.0}


RAMPS = [
    ((0, 8),),
    ((0, 8), (320, 16)),
    ((0, 8), (100, 16)),
    ((0, 48), (10, 8), (20, 32)),
    ((0, 4), (4, 6), (10, 10)),
]


@pytest.mark.parametrize("ramp", RAMPS)
def test_batch_size_and_steps_follow_megatrons_calculator(
    ramp: tuple[tuple[int, int], ...],
) -> None:
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    sequence_length = 96
    schedule = Schedule(train_samples=10**6, batch_schedule=ramp) if len(ramp) == 1 else bare(ramp)
    calculator = StepBatchsizeNumMicroBatchesCalculator(
        micro_batch_size=2,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        rank=1,
        schedule=" ".join(f"{start * sequence_length}:{size}" for start, size in ramp),
        seq_length=sequence_length,
    )
    consumed = 0
    for step in range(100):  # the loop of megatron/training/training.py:update_train_iters
        assert schedule.samples(step) == consumed
        assert schedule.steps(consumed) == step
        assert schedule.steps(consumed - 1) == step if consumed else True
        assert schedule.steps(consumed + 1) == step + 1
        calculator.update(consumed, consistency_check=False)
        assert schedule.batch_size(consumed) == calculator.get_current_global_batch_size()
        consumed += calculator.get_current_global_batch_size()


def bare(ramp: tuple[tuple[int, int], ...]) -> Schedule:
    """Return a schedule with this ramp that ends on a full step."""
    for train_samples in range(1000, 2000):
        try:
            return Schedule(train_samples=train_samples, batch_schedule=ramp)
        except InputError:
            continue
    raise AssertionError(ramp)


def test_from_steps_counts_the_reports_schedule() -> None:
    constant = Schedule.from_steps(
        train_steps=323_459, warmup_steps=2000, decay_steps=49_306, batch_sizes=((0, 4096),)
    )
    assert constant.train_samples == 1_324_888_064
    assert constant.decay_samples == 201_957_376
    ramped = Schedule.from_steps(
        train_steps=323_459,
        warmup_steps=2000,
        decay_steps=49_306,
        batch_sizes=((0, 2048), (12_128, 4096)),
    )
    assert ramped.warmup_samples == 4_096_000
    assert ramped.decay_samples == 201_957_376
    assert ramped.train_samples == 1_324_888_064 - 12_128 * 2048
    assert ramped.batch_schedule == ((0, 2048), (12_128 * 2048, 4096))
    assert ramped.train_steps == 323_459
    assert ramped.samples(12_128) == 12_128 * 2048
    assert (ramped.batch_size(12_128 * 2048 - 1), ramped.batch_size(12_128 * 2048)) == (2048, 4096)


@pytest.mark.parametrize(
    ("changes", "named", "fix"),
    [
        ({"train_samples": 650}, "schedule.train_samples=650", "640 or 656"),
        ({"train_samples": 0}, "schedule.train_samples=0", "1 or more"),
        ({"warmup_samples": 481}, "schedule.warmup_samples=481", "schedule.warmup_samples=64"),
        (
            {"warmup_samples": 640, "decay_samples": 0},
            "schedule.warmup_samples=640",
            "schedule.warmup_samples=64",
        ),
        ({"decay_samples": -1}, "schedule.decay_samples=-1", "0"),
        ({"horizon_samples": 320}, "schedule.train_samples=640", "schedule.horizon_samples"),
        ({"style": "cosine"}, "schedule.style=cosine", "schedule.decay_samples=0"),
        ({"batch_schedule": ((8, 8),)}, "schedule.batch_schedule=[[8, 8]]", "[[0, SIZE]"),
        ({"batch_schedule": ((0, 8), (0, 16))}, "schedule.batch_schedule", "sort"),
        ({"batch_schedule": ()}, "schedule.batch_schedule=[]", "[[0, SIZE]"),
        ({"batch_schedule": ((0, 0),)}, "schedule.batch_schedule", "1 or more"),
        ({"micro_batch_size": 0}, "schedule.micro_batch_size=0", "1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], named: str, fix: str) -> None:
    with pytest.raises(InputError) as error:
        dataclasses.replace(WHD, **changes)
    assert named in error.value.value
    assert fix in error.value.fix


def test_the_proposed_lengths_fit() -> None:
    with pytest.raises(InputError) as error:
        dataclasses.replace(WHD, warmup_samples=600)
    warmup, decay = (int(word.partition("=")[2]) for word in error.value.fix.split() if "=" in word)
    dataclasses.replace(WHD, warmup_samples=warmup, decay_samples=decay)
