"""Pre-training: the report's three phases of one schedule (report §3, App. B).

A phase is a run of its own, with its own data and folder. It continues the phase before it with
weights, optimizer state, step and sample count (``checkpoint.continue_from``). Step 1 is therefore
the first of phase 1 and step 323,459 the last of phase 3, under one learning-rate schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import Data, Logging, Optimizer, Precision, Schedule
from mellum2_megatron.recipes.hardware import Hardware, h200_nodes
from mellum2_megatron.recipes.stage import Stage

SEQUENCE_LENGTH = 8192
"""Tokens a sequence (report §2)."""

TRAIN_STEPS = 323_459
"""Optimizer steps of the three phases (report App. B)."""

RAMP_STEPS = 12_128
"""Steps at 2,048 sequences before the batch doubles.

The report gives neither the length nor the shape of the ramp. With one step from 2,048 to 4,096 its
two totals leave no choice: 323,459 steps see 10.65T tokens (report §3) only if about 12,128 of them
were half as large.
"""

SCHEDULE = Schedule.from_steps(
    train_steps=TRAIN_STEPS,
    warmup_steps=2_000,
    decay_steps=49_306,
    batch_sizes=((0, 2048), (RAMP_STEPS, 4096)),
    micro_batch_size=2,
)
"""The one schedule of the three phases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of pre-training.

    Attributes:
        name: the report's name.
        tokens: tokens of the phase (report §3). The three add up to 10.66T, 0.01T more than the
            total of the report, which ends the last phase.
        schedule: course of the learning rate, for the description.
    """

    name: str
    tokens: float
    schedule: str


PHASES = (
    Phase(name="Foundation", tokens=6.18e12, schedule="warmup, batch ramp and hold"),
    Phase(name="Quality Uplift", tokens=2.79e12, schedule="hold"),
    Phase(name="Capability Sharpening", tokens=1.69e12, schedule="hold, then decay to zero"),
)


def _phase_ends() -> tuple[int, ...]:
    ends, tokens = [], 0.0
    for phase in PHASES[:-1]:
        tokens += phase.tokens
        # A run ends after a whole step, so a phase may see up to one step more than its tokens.
        ends.append(SCHEDULE.samples(SCHEDULE.steps(round(tokens / SEQUENCE_LENGTH))))
    return (*ends, SCHEDULE.train_samples)


PHASE_ENDS = _phase_ends()
"""Sample after the last one of each phase, on whole steps."""

SOURCES = {
    "architecture.max_position_embeddings": (
        "report §2: 8,192 native; released Base-Pretrain config.json"
    ),
    "layout": "report §3: EP 8, TP 1, PP 1",
    "layout.dp": "report §3: 32 nodes of 8 H200",  # other hardware has its own source
    "schedule.style": "report §3: WHD",
    "schedule.train_samples": "report App. B: the last of 323,459 steps",
    "schedule.horizon_samples": (
        "report App. B: 323,459 steps, of which RAMP_STEPS at 2,048 sequences"
    ),
    "schedule.warmup_samples": "report App. B: 2,000 steps, all of them at 2,048 sequences",
    "schedule.decay_samples": "report App. B: the last 49,306 steps, at 4,096 sequences",
    "schedule.batch_schedule": (
        "report §3: 2,048 to 4,096; when follows from steps and tokens, see RAMP_STEPS"
    ),
    "schedule.micro_batch_size": "report App. B",
    "data.sequence_length": "report §3: packed into 8,192 tokens",
    "data.first_sample": "where the former phase ended; each phase has data of its own (report §3)",
    "checkpoint.continue_from": (
        "the report's one schedule of 323,459 steps: state and step count go on"
    ),
}

_H200_256 = h200_nodes(256, source="report §3: 32 nodes of 8 H200")

HARDWARE = {
    "": _H200_256,
    "_256gpu_h200_fp8": _H200_256,
    "_128gpu_h200_fp8": h200_nodes(
        128, source="report §3: 16 nodes of 8 H200, as later in the training"
    ),
    "_8gpu_h200_fp8": h200_nodes(8, source="ours: the same training on one node"),
}


def three_phases(
    *,
    architecture: Mellum2Architecture,
    optimizer: Optimizer,
    schedule: Schedule,
    ends: Sequence[int],
    tokens: Sequence[str],
    precision: Precision,
    data: Sequence[Data],
    logging: Logging,
    save_interval: int,
    hardware: Mapping[str, Hardware],
    sources: Mapping[str, str],
) -> tuple[Stage, ...]:
    """Return a pre-training as three stages: one schedule, cut at ``ends``.

    Args:
        architecture: the model.
        optimizer, precision, logging, save_interval, hardware: see `Stage`.
        schedule: schedule of the whole pre-training.
        ends: sample after the last one of each phase.
        tokens: each phase's tokens, for its description.
        data: each phase's data.
        sources: overrides of `SOURCES`, which give each end as the report's.
    """
    stages = []
    for number, (phase, end, amount, own_data) in enumerate(
        zip(PHASES, ends, tokens, data, strict=True), 1
    ):
        # The end of the last phase is the total of App. B, as in SOURCES.
        end_source = {}
        if number < len(PHASES):
            total = " + ".join(f"{earlier.tokens / 1e12:g}T" for earlier in PHASES[:number])
            end_source["schedule.train_samples"] = (
                f"report §3: {total} tokens, rounded up to a whole step"
            )
        stages.append(
            Stage(
                name=f"pretrain_phase{number}",
                summary=f"phase {number} of 3 ({phase.name}, {amount}): {phase.schedule}",
                architecture=architecture,
                optimizer=optimizer,
                # The horizon stays that of the whole: a phase stops in the middle of the schedule.
                schedule=replace(
                    schedule, train_samples=end, horizon_samples=schedule.train_samples
                ),
                precision=precision,
                data=replace(own_data, first_sample=ends[number - 2] if number > 1 else 0),
                logging=logging,
                save_interval=save_interval,
                start="continue" if number > 1 else "new",
                hardware=hardware,
                sources={**SOURCES, **end_source, **sources},
            )
        )
    return tuple(stages)


PRETRAINING = three_phases(
    architecture=Mellum2Architecture.preset("mellum2-12b"),
    optimizer=Optimizer(),  # the defaults are the report's
    schedule=SCHEDULE,
    ends=PHASE_ENDS,
    tokens=("6.18T tokens at 8K", "2.79T tokens at 8K", "1.69T tokens at 8K"),
    precision=Precision(compute="fp8"),
    data=[
        Data(path=f"data/phase{number}", sequence_length=SEQUENCE_LENGTH) for number in (1, 2, 3)
    ],
    logging=Logging(log_interval=10, eval_interval=1000, eval_iterations=8),
    save_interval=1000,
    hardware=HARDWARE,
    sources={},
)
"""The three phases of the 12B."""
