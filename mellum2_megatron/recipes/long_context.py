"""Long context: 3,500 steps at 131,072 tokens from the weights of phase 3 (report §4).

The stage has a schedule of its own. Its model is that of phase 3, with YaRN on the full-attention
layers.
"""

from __future__ import annotations

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import Data, Logging, Optimizer, Precision, Schedule
from mellum2_megatron.recipes.hardware import cluster
from mellum2_megatron.recipes.stage import DOCUMENTS, PLAN, Stage

SEQUENCE_LENGTH = 131_072
"""Tokens a sequence (report §4)."""

SEQUENCES = 256
"""Sequences a step: 117B tokens in 3,500 steps (report §4)."""

CP = 8
"""Context-parallel ways: the report's for its SFT at the same length (report §5.1)."""

LONG_CONTEXT = Stage(
    name="long_context",
    summary="long context (117B tokens at 128K, layer-selective YaRN)",
    architecture=Mellum2Architecture.preset("mellum2-12b-128k"),
    optimizer=Optimizer(lr=3e-5),  # report §4; everything else as in pre-training
    schedule=Schedule.from_steps(
        train_steps=3_500,
        warmup_steps=100,
        decay_steps=500,
        batch_sizes=((0, SEQUENCES),),
        micro_batch_size=1,  # CP ranks already share one sequence
    ),
    precision=Precision(compute="fp8"),
    # The plan's pieces must begin at multiples of 2 CP: `align: 16`.
    data=Data(path=PLAN, phase=4, sequence_length=SEQUENCE_LENGTH, document_attention=True),
    logging=Logging(log_interval=10, eval_interval=500, eval_iterations=4),
    save_interval=500,
    start="weights",  # the optimizer state belongs to the other schedule
    keep_last=3,
    retain_interval=1000,
    hardware=cluster(
        {
            128: "report §5.1: 16 nodes of 8 H200",
            256: "ours: as many nodes as at the start of the pre-training (report §3)",
            8: "ours: the same training on one node",
        },
        default=128,
        cp=CP,
    ),
    sources={
        "architecture.max_position_embeddings": "report §4: 131,072",
        "architecture.rope_full_attention": (
            "report §4: YaRN on the full-attention layers only; released config"
        ),
        "layout": (
            "report §5.1: EP 8 and CP 8, for its SFT at the same length; §4 gives no layout"
        ),
        "layout.dp": "report §5.1: 16 nodes of 8 H200",  # other hardware has its own source
        "optimizer.lr": "report §4",
        "schedule": "report §4: WHD of 3,500 steps with 500 of decay",
        "schedule.warmup_samples": (
            "ours: 100 steps, as in the report's SFT (§5.1); §4 gives no warmup"
        ),
        "schedule.batch_schedule": (
            "report §4: 117B tokens in 3,500 steps are 256 sequences of 131,072 tokens a step"
        ),
        "schedule.micro_batch_size": "ours: eight ranks share one sequence",
        "data.sequence_length": "report §4",
        "data.phase": "ours: the plan's fourth, after the three of pre-training",
        "data.document_attention": DOCUMENTS,
        "checkpoint.load": "ours: weights only, because the stage has a schedule of its own",
    },
)
"""The long-context stage of the 12B."""
