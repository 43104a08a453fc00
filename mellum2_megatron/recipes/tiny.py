"""Mellum 2 on two CPU cores: the quickstart, and every stage of the training in a minute or two.

::

    mellum2 train mellum2_tiny_pretrain_phase1 && mellum2 train mellum2_tiny_pretrain_phase2 && ..
"""

from __future__ import annotations

import math
from dataclasses import replace

from mellum2_megatron.architecture import Mellum2Architecture, RopeParameters
from mellum2_megatron.config import (
    Checkpoint,
    Data,
    Layout,
    Logging,
    Optimizer,
    Precision,
    Run,
    Schedule,
)
from mellum2_megatron.recipes import long_context, pretraining
from mellum2_megatron.recipes.hardware import Hardware
from mellum2_megatron.recipes.stage import OPERATION, STABILITY, StageFamily

DATA = "data/quickstart"
SEQUENCE_LENGTH = 256
"""Tokens a sequence: half the native context, and four windows."""

EXTENSION = 4
"""Factor by which the long-context stage lengthens context and sequences; 16 in the report (§4)."""

PHASE_STEPS = (59, 84, 100)
"""Step after which each phase ends: the report's shares of 323,459 steps."""

ARCHITECTURE = Mellum2Architecture.preset("mellum2-tiny")
# 2e-3 was tuned at this size and batch. On a CPU there is no compute to overlap with.
OPTIMIZER = Optimizer(lr=2e-3, overlap_grad_reduce=False, overlap_param_gather=False)

PROPORTIONS = "preset mellum2-tiny: the report's proportions at a size two CPU cores can train"
TWO_RANKS = "two ranks share the experts, as eight do in the report (report §3)"
LEARNING_RATE = "tuned at this size and batch; the report's 3e-4 is for the 12B"
LENGTHS = "as in the report (report §3) in proportion, in a few minutes on two cores"

OVERLAP_SOURCES = {
    "optimizer.overlap_grad_reduce": "nothing to hide behind on a CPU",
    "optimizer.overlap_param_gather": "nothing to hide behind on a CPU",
}

STAGE_SOURCES = {
    "architecture": PROPORTIONS,
    "architecture.max_position_embeddings": "ours: eight windows",
    **OVERLAP_SOURCES,
    "precision": "BF16: FP8 needs a GPU",
    "precision.fp8_param_gather": "no FP8",
    "schedule.micro_batch_size": "ours: two ranks, and a batch that grows",
    "data.seed": "ours: the phases share one corpus, each in an order of its own",
}

SCHEDULE = Schedule.from_steps(
    train_steps=PHASE_STEPS[-1],
    warmup_steps=8,
    decay_steps=15,
    batch_sizes=((0, 4), (8, 8)),
    micro_batch_size=2,
)

PHASES = pretraining.three_phases(
    architecture=ARCHITECTURE,
    optimizer=OPTIMIZER,
    schedule=SCHEDULE,
    ends=[SCHEDULE.samples(step) for step in PHASE_STEPS],
    tokens=("112K tokens", "51K tokens", "32K tokens"),
    precision=Precision(),
    data=[
        Data(path=DATA, sequence_length=SEQUENCE_LENGTH, workers=0, seed=number)
        for number in (1, 2, 3)
    ],
    logging=Logging(log_interval=2, eval_interval=20, eval_iterations=4),
    save_interval=20,
    hardware={
        "": Hardware(label="two CPU ranks", layout=Layout(ep=2), source="ours: two CPU cores")
    },
    sources={
        **STAGE_SOURCES,
        "optimizer.lr": LEARNING_RATE,
        "layout": TWO_RANKS,
        "data.sequence_length": "ours: half the native context, four windows",
        "schedule.train_samples": LENGTHS,
        "schedule.horizon_samples": LENGTHS,
        "schedule.warmup_samples": LENGTHS,
        "schedule.decay_samples": LENGTHS,
        "schedule.batch_schedule": LENGTHS,
    },
)

LONG_CONTEXT = replace(
    long_context.LONG_CONTEXT,
    summary="long context (41K tokens at 1K, layer-selective YaRN)",
    architecture=ARCHITECTURE.replace(
        max_position_embeddings=EXTENSION * ARCHITECTURE.max_position_embeddings,
        # YaRN on the full-attention layers, scaled as the released model's.
        rope_full_attention=RopeParameters(
            rope_type="yarn",
            rope_theta=ARCHITECTURE.rope_full_attention.rope_theta,
            factor=float(EXTENSION),
            original_max_position_embeddings=ARCHITECTURE.max_position_embeddings,
            attention_factor=0.1 * math.log(EXTENSION) + 1,
        ),
    ),
    optimizer=replace(OPTIMIZER, lr=2e-4),  # a tenth of the phases', as 3e-5 is of 3e-4 (§4)
    schedule=Schedule.from_steps(
        train_steps=20, warmup_steps=2, decay_steps=5, batch_sizes=((0, 2),), micro_batch_size=1
    ),
    precision=Precision(),
    data=Data(path=DATA, sequence_length=EXTENSION * SEQUENCE_LENGTH, workers=0),
    logging=Logging(log_interval=2, eval_interval=10, eval_iterations=2),
    save_interval=10,
    hardware={
        "": Hardware(label="two CPU ranks", layout=Layout(ep=2, cp=2), source="ours: two CPU cores")
    },
    sources={
        **long_context.LONG_CONTEXT.sources,
        **STAGE_SOURCES,
        "architecture.max_position_embeddings": (
            "ours: four times the native context; report §4: sixteen times"
        ),
        "architecture.rope_full_attention": "report §4: YaRN on the full-attention layers only",
        "optimizer.lr": "a tenth of the phases' rate, as in the report (§4)",
        "layout": "EP 2 and CP 2 where the 12B has EP 8 and CP 8",
        "schedule": "WHD as in the report (§4), in a minute on two cores",
        "schedule.warmup_samples": "ours: two steps",
        "schedule.batch_schedule": "ours: what two cores can do",
        "schedule.micro_batch_size": "one sequence is the work of all context-parallel ranks",
        "data.sequence_length": "ours: four times the phases', and twice the native context",
    },
)

TINY = StageFamily(name="mellum2_tiny", title="Tiny Mellum 2", stages=(*PHASES, LONG_CONTEXT))


def quickstart() -> Run:
    """Return ``mellum2_tiny_pretrain``: one pre-training without phases, ten minutes long."""
    return Run(
        name="mellum2_tiny_pretrain",
        description="A 4-layer Mellum 2 that learns Python source on two CPU cores in minutes; "
        "every part of the 12B is in it.",
        architecture=ARCHITECTURE,
        layout=Layout(ep=2),
        optimizer=OPTIMIZER,
        schedule=Schedule.from_steps(
            train_steps=300,
            warmup_steps=20,
            decay_steps=100,
            batch_sizes=((0, 8), (20, 16)),
            micro_batch_size=4,
        ),
        data=Data(path=DATA, sequence_length=SEQUENCE_LENGTH, workers=0),
        logging=Logging(log_interval=5, eval_interval=50, eval_iterations=4),
        checkpoint=Checkpoint(save_interval=100),
        sources={
            "architecture": PROPORTIONS,
            "layout": TWO_RANKS,
            "optimizer": "report §3",
            "optimizer.lr": LEARNING_RATE,
            **OVERLAP_SOURCES,
            "loss": "report §2, §3",
            "schedule": (
                "WHD and a batch that doubles, as in the report (report §3), "
                "in ten minutes on two cores"
            ),
            "precision": "BF16: FP8 needs a GPU",
            "stability": STABILITY,
            "data": OPERATION,
            "logging": OPERATION,
            "checkpoint": OPERATION,
            "seed": OPERATION,
            "backend": OPERATION,
            "timeout_minutes": OPERATION,
        },
    )
