"""Pre-training: the report's three phases of one schedule (report §3, App. B).

A phase is a run with its own data and folder. It continues the phase before it with weights,
optimizer state, step and sample count (``checkpoint.continue_from``). One learning-rate schedule
covers all steps, from step 1 of phase 1 to step 323,459 at the end of phase 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import Data, Logging, Optimizer, Precision, Schedule
from mellum2_megatron.recipes.hardware import Hardware, cluster
from mellum2_megatron.recipes.stage import DOCUMENTS, PLAN, Stage

SEQUENCE_LENGTH = 8192
"""Tokens a sequence (report §2)."""

TRAIN_STEPS = 323_459
"""Optimizer steps of the three phases (report App. B)."""

RAMP_STEPS = 12_128
"""Steps at 2,048 sequences before the batch doubles.

The report gives neither length nor shape of the ramp. If the batch doubles once, its two totals
decide the length: 323,459 steps see 10.65T tokens (report §3) only if about 12,128 of them have
2,048 sequences.
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
        name: name in the report.
        tokens: number of tokens (report §3). The three add up to 10.66T, 0.01T more than the
            report's total; the last phase ends at the total.
        schedule: part of the learning-rate schedule, for the recipe's description.
    """

    name: str
    tokens: float
    schedule: str


PHASES = (
    Phase(name="Foundation", tokens=6.18e12, schedule="warmup, batch ramp and hold"),
    Phase(name="Quality Uplift", tokens=2.79e12, schedule="hold"),
    Phase(name="Capability Sharpening", tokens=1.69e12, schedule="hold, then decay to zero"),
)


PHASE_ENDS = (
    # A run ends after a whole step, so a phase may see up to one step more than its tokens.
    *(
        SCHEDULE.samples(SCHEDULE.steps(round(tokens / SEQUENCE_LENGTH)))
        for tokens in itertools.accumulate(phase.tokens for phase in PHASES[:-1])
    ),
    SCHEDULE.train_samples,
)
"""Sample count at which each phase ends."""

SOURCES = {
    "architecture.max_position_embeddings": (
        "report §2: 8,192 native; released Base-Pretrain config.json"
    ),
    "layout": "report §3: EP 8, TP 1, PP 1",
    "layout.dp": "report §3: 32 nodes of 8 H200",  # other hardware has its own source
    "schedule.style": "report §3: WHD",
    "schedule.train_samples": "report App. B: the last of 323,459 steps",
    "schedule.horizon_samples": (
        "report App. B: 323,459 steps, the first RAMP_STEPS of them at 2,048 sequences"
    ),
    "schedule.warmup_samples": "report App. B: 2,000 steps, all of them at 2,048 sequences",
    "schedule.decay_samples": "report App. B: the last 49,306 steps, at 4,096 sequences",
    "schedule.batch_schedule": (
        "report §3: 2,048, then 4,096; the step follows from the totals of steps and tokens "
        "(RAMP_STEPS)"
    ),
    "schedule.micro_batch_size": "report App. B",
    "schedule.rewarm_at": "ours: the rate never rises again after the warmup",
    "data.sequence_length": "report §3: packed into 8,192 tokens",
    "data.phase": "report §3: each phase has a mixture of its own; numbers are those of the plan",
    "data.document_attention": DOCUMENTS,
    "data.first_sample": "end of the phase before; each phase has its own data (report §3)",
    "checkpoint.continue_from": (
        "report App. B: one schedule of 323,459 steps, so all state and the step count continue"
    ),
}

HARDWARE = cluster(
    {
        256: "report §3: 32 nodes of 8 H200",
        128: "report §3: 16 nodes of 8 H200, in the later part of the training",
        8: "ours: the same training on one node",
    },
    default=256,
)


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
    keep_last: int | None = None,
    retain_interval: int | None = None,
) -> tuple[Stage, ...]:
    """Return a pre-training as three stages: one schedule, cut at ``ends``.

    Args:
        architecture: the model.
        optimizer, precision, logging, save_interval, hardware, keep_last, retain_interval: see
            `Stage`.
        schedule: schedule of the whole pre-training.
        ends: sample count at which each phase ends.
        tokens: number of tokens of each phase, as text for its description.
        data: data of each phase; ``first_sample`` is set here.
        sources: overrides of `SOURCES` and of the report's phase ends.
    """
    stages = []
    for number, (phase, end, amount, own_data) in enumerate(
        zip(PHASES, ends, tokens, data, strict=True), 1
    ):
        # `SOURCES` has the source of the last end: the total of App. B.
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
                # A phase ends in the middle of the one learning-rate schedule.
                schedule=replace(
                    schedule, train_samples=end, horizon_samples=schedule.train_samples
                ),
                precision=precision,
                data=replace(own_data, first_sample=ends[number - 2] if number > 1 else 0),
                logging=logging,
                save_interval=save_interval,
                keep_last=keep_last,
                retain_interval=retain_interval,
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
        Data(path=PLAN, phase=number, sequence_length=SEQUENCE_LENGTH, document_attention=True)
        for number in (1, 2, 3)
    ],
    logging=Logging(log_interval=10, eval_interval=1000, eval_iterations=8),
    save_interval=1000,
    keep_last=3,
    retain_interval=10_000,
    hardware=HARDWARE,
    sources={},
)
"""The three phases of the 12B."""
