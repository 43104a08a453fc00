"""Four layers of the 12B at full width, for one GPU: all of the production path, little depth.

`FOUR_LAYERS` has every stage, with phases and decay in the report's proportions.
`four_layer_pretraining` is one longer pre-training without phases.
"""

from __future__ import annotations

from dataclasses import replace

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import (
    Checkpoint,
    Layout,
    Logging,
    Optimizer,
    Precision,
    Run,
    Schedule,
)
from mellum2_megatron.recipes import long_context, pretraining
from mellum2_megatron.recipes.hardware import ONE_GPU
from mellum2_megatron.recipes.stage import COMMON_SOURCES, LENGTHS, StageFamily

LAYERS = 4
"""One period of the attention pattern: three sliding layers and a full one."""

LONG_SEQUENCE_LENGTH = 32_768
"""Tokens a sequence in the long-context stage: as many as one H200 holds."""

PHASE_STEPS = (588, 845, 1_000)
"""Step at which each phase ends: the same shares of 1,000 steps as the report's of 323,459."""

HARDWARE = {"_1gpu_h200_fp8": ONE_GPU}

SOURCES = {
    "architecture": "report §2, table Architecture configuration, except the depth",
    "architecture.num_hidden_layers": "ours: one period of the attention pattern",
    "layout": "ours: one GPU",
}

SCHEDULE = Schedule.from_steps(
    train_steps=PHASE_STEPS[-1],
    # Longer than the report's shares of 1,000 steps: 6 of warmup and 37 at the first batch size.
    warmup_steps=50,
    decay_steps=150,
    batch_sizes=((0, 32), (100, 64)),
    micro_batch_size=2,
)

PHASES = pretraining.three_phases(
    architecture=Mellum2Architecture.preset("mellum2-12b").replace(num_hidden_layers=LAYERS),
    optimizer=Optimizer(),
    schedule=SCHEDULE,
    ends=[SCHEDULE.samples(step) for step in PHASE_STEPS],
    # Samples between two ends, times 8,192; a test compares these texts with the schedule.
    tokens=("282M tokens at 8K", "135M tokens at 8K", "81M tokens at 8K"),
    precision=Precision(compute="fp8"),
    data=[phase.data for phase in pretraining.PRETRAINING],
    logging=Logging(log_interval=10, eval_interval=200, eval_iterations=8),
    save_interval=200,
    hardware=HARDWARE,
    sources={
        **SOURCES,
        **dict.fromkeys(
            LENGTHS,
            "report §3: WHD and a batch that doubles; "
            "lengths are ours, phases and decay in the report's proportions",
        ),
    },
)

# The 12B's stage with fewer layers, steps and tokens; learning rate and precision are the same.
LONG_CONTEXT = replace(
    long_context.LONG_CONTEXT,
    keep_last=None,
    retain_interval=None,
    summary="long context (52.4M tokens at 32K, layer-selective YaRN)",
    architecture=long_context.LONG_CONTEXT.architecture.replace(num_hidden_layers=LAYERS),
    schedule=Schedule.from_steps(
        train_steps=100,
        warmup_steps=5,
        decay_steps=15,
        batch_sizes=((0, 16),),
        micro_batch_size=1,
    ),
    data=replace(long_context.LONG_CONTEXT.data, sequence_length=LONG_SEQUENCE_LENGTH),
    logging=Logging(log_interval=5, eval_interval=50, eval_iterations=4),
    save_interval=50,
    hardware=HARDWARE,
    sources={
        **long_context.LONG_CONTEXT.sources,
        **SOURCES,
        "schedule": "report §4: WHD; lengths are ours, the decay about in the report's proportion",
        "schedule.warmup_samples": "ours: 5 of 100 steps",
        "schedule.batch_schedule": "ours: 0.5M tokens a step",
        "data.sequence_length": (
            "ours: as long as one GPU holds; the rotation is that of 128K (report §4)"
        ),
    },
)

FOUR_LAYERS = StageFamily(
    name="mellum2_4layer", title="Four layers of the 12B", stages=(*PHASES, LONG_CONTEXT)
)


def four_layer_pretraining() -> Run:
    """Return ``mellum2_4layer_pretrain_1gpu_h200_fp8``: one billion tokens in one run."""
    return Run(
        name="mellum2_4layer_pretrain_1gpu_h200_fp8",
        description="Four layers of the 12B at full width (2.55B parameters) on one GPU: "
        "the production path, small.",
        architecture=Mellum2Architecture.preset("mellum2-12b").replace(num_hidden_layers=LAYERS),
        layout=Layout(dp=1),
        optimizer=Optimizer(),
        schedule=Schedule.from_steps(
            train_steps=2_000,
            warmup_steps=100,
            decay_steps=300,
            batch_sizes=((0, 32), (200, 64)),
            micro_batch_size=2,
        ),
        precision=Precision(compute="fp8"),
        data=pretraining.PRETRAINING[0].data,
        logging=Logging(log_interval=10, eval_interval=200, eval_iterations=8),
        checkpoint=Checkpoint(save_interval=500),
        sources={
            **COMMON_SOURCES,
            **SOURCES,
            "schedule": (
                "report §3: WHD and a batch that doubles; lengths are ours: one billion tokens"
            ),
            "schedule.micro_batch_size": "report App. B",
            **{
                key: pretraining.SOURCES[key]
                for key in ("data.sequence_length", "data.phase", "data.document_attention")
            },
        },
    )
