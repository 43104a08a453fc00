"""Mellum 2 on two CPU cores: the quickstart, and each stage of the training in a minute or two.

::

    mellum2 train mellum2_tiny_pretrain_phase1
    mellum2 train mellum2_tiny_pretrain_phase2
    mellum2 train mellum2_tiny_pretrain_phase3
    mellum2 train mellum2_tiny_long_context
    mellum2 train mellum2_tiny_sft_instruct      # data: mellum2 data chat --length 1024
    mellum2 train mellum2_tiny_sft_thinking
    mellum2 rl mellum2_tiny_rlvr_instruct        # tasks: docs/rlvr.md
    mellum2 rl mellum2_tiny_rlvr_thinking
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
    Objective,
    Optimizer,
    Precision,
    Rl,
    Run,
    Schedule,
)
from mellum2_megatron.recipes import long_context, pretraining, rlvr, sft
from mellum2_megatron.recipes.hardware import Hardware
from mellum2_megatron.recipes.stage import LENGTHS, OPERATION_SOURCES, Stage, StageFamily

DATA = "data/quickstart"
"""Packs of the tiny recipes, which `mellum2 quickstart` prepares."""

LONG_DATA = "data/quickstart_long"
"""Packs of the long-context stage: the same corpus in longer sequences (docs/stages.md)."""

SEQUENCE_LENGTH = 256
"""Tokens a sequence: half the native context, and four attention windows."""

EXTENSION = 16
"""Factor of the long-context stage on the sequence length (report §4)."""

LONG_LENGTH = EXTENSION * SEQUENCE_LENGTH
"""Tokens a sequence of the long-context stage, and the longest context of its model."""

SFT_LENGTH = 1024
"""Tokens of a pack of conversations."""

PHASE_STEPS = (59, 84, 100)
"""Step at which each phase ends: the same shares of 100 steps as the report's of 323,459."""

ARCHITECTURE = Mellum2Architecture.preset("mellum2-tiny")
# 2e-3 was tuned at this size and batch. Overlap needs a device that computes meanwhile.
OPTIMIZER = Optimizer(lr=2e-3, overlap_grad_reduce=False, overlap_param_gather=False)

PROPORTIONS = "preset mellum2-tiny: the report's proportions at a size two CPU cores can train"
TWO_RANKS = "ours: two ranks share the experts, as eight do in the report (§3)"
LEARNING_RATE = "ours: tuned at this size and batch; the report's 3e-4 is for the 12B"
BF16 = "ours: BF16, because FP8 needs a GPU"

OVERLAP_SOURCES = dict.fromkeys(
    ("optimizer.overlap_grad_reduce", "optimizer.overlap_param_gather"),
    "ours: no overlap of communication on a CPU, which has no other device to compute meanwhile",
)

STAGE_SOURCES = {
    "architecture": PROPORTIONS,
    "architecture.max_position_embeddings": "ours: eight windows",
    **OVERLAP_SOURCES,
    "precision": BF16,
    "precision.fp8_param_gather": BF16,
    "schedule.micro_batch_size": "ours: the first batch of 4 is one micro-batch on each rank",
    "data.seed": "ours: the phases share one corpus, and each shuffles it differently",
}

SCHEDULE = Schedule.from_steps(
    train_steps=PHASE_STEPS[-1],
    # The report's share of 100 steps would be one step of warmup and four at the first batch size.
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
        **dict.fromkeys(
            LENGTHS,
            "ours: a few minutes on two cores; phases and decay in the report's proportions (§3)",
        ),
    },
)

LONG_CONTEXT = replace(
    long_context.LONG_CONTEXT,
    keep_last=None,
    retain_interval=None,
    summary="long context (164K tokens at 4K, layer-selective YaRN)",
    architecture=ARCHITECTURE.replace(
        max_position_embeddings=LONG_LENGTH,
        rope_full_attention=RopeParameters(
            rope_type="yarn",
            rope_theta=ARCHITECTURE.rope_full_attention.rope_theta,
            factor=float(EXTENSION),
            # The length that was trained on, half of the phases' longest.
            original_max_position_embeddings=SEQUENCE_LENGTH,
            # As in the released model.
            attention_factor=0.1 * math.log(EXTENSION) + 1,
        ),
    ),
    optimizer=replace(OPTIMIZER, lr=2e-4),  # a tenth of the phases' rate, as in the report (§4)
    schedule=Schedule.from_steps(
        train_steps=20, warmup_steps=2, decay_steps=5, batch_sizes=((0, 2),), micro_batch_size=1
    ),
    precision=Precision(),
    data=Data(path=LONG_DATA, sequence_length=LONG_LENGTH, workers=0),
    logging=Logging(log_interval=2, eval_interval=10, eval_iterations=2),
    save_interval=10,
    hardware={
        "": Hardware(label="two CPU ranks", layout=Layout(ep=2, cp=2), source="ours: two CPU cores")
    },
    sources={
        **long_context.LONG_CONTEXT.sources,
        **STAGE_SOURCES,
        "architecture.max_position_embeddings": (
            "report §4: sixteen times the length trained on before"
        ),
        "architecture.rope_full_attention": "report §4: YaRN on the full-attention layers only",
        "optimizer.lr": "ours: a tenth of the phases' rate, as in the report (§4)",
        "layout": "ours: EP 2 and CP 2 in place of the 12B's EP 8 and CP 8",
        "schedule": "report §4: WHD; lengths are ours, for two minutes on two cores",
        "schedule.warmup_samples": "ours: two steps",
        "schedule.batch_schedule": "ours: as much as two cores can do",
        "schedule.micro_batch_size": "ours: the context-parallel ranks share one sequence",
        "data.sequence_length": "report §4: sixteen times the phases'",
    },
)


def _sft(kind: sft.Kind) -> Stage:
    return sft.sft_stage(
        kind,
        architecture=LONG_CONTEXT.architecture,
        optimizer=replace(OPTIMIZER, lr=1e-3, min_lr=1e-4),
        schedule=Schedule.from_steps(
            style="cosine",
            train_steps=40,
            warmup_steps=4,
            batch_sizes=((0, 8),),
            micro_batch_size=1,
        ),
        precision=Precision(),
        data=Data(
            path=f"data/tiny_sft_{kind.name}",
            sequence_length=SFT_LENGTH,
            workers=0,
            document_attention=True,
        ),
        logging=Logging(log_interval=2, eval_interval=20, eval_iterations=2),
        save_interval=20,
        hardware=LONG_CONTEXT.hardware,
        sources={
            **STAGE_SOURCES,
            "architecture": LONG_CONTEXT.sources["architecture"],
            "optimizer.lr": "ours: half the phases' rate; so small a model learns a format with it",
            "optimizer.min_lr": "report §5.1: a tenth of the peak",
            "layout": LONG_CONTEXT.sources["layout"],
            "schedule": "report §5.1: cosine; lengths are ours, for two minutes on two cores",
            "schedule.train_samples": "ours: 40 steps",
            "schedule.warmup_samples": "ours: 4 steps",
            "schedule.batch_schedule": "ours: as much as two cores can do",
            "schedule.micro_batch_size": "ours: the context-parallel ranks share one sequence",
            "data.sequence_length": "ours: a few conversations each",
        },
        tokens="328K tokens at 1K",
    )


def _rlvr(kind: rlvr.Kind) -> Stage:
    objective = Objective(
        group_size=8, prompts=8, max_tokens=kind.tokens // 256, overlong_tokens=kind.tokens // 1024
    )
    return rlvr.rlvr_stage(
        kind,
        architecture=LONG_CONTEXT.architecture,
        optimizer=replace(
            OPTIMIZER,
            name="adam",
            lr=1e-4,
            min_lr=1e-5,
            weight_decay=0.01,
            adam_beta2=0.999,
        ),
        schedule=rlvr.rl_schedule(objective, steps=20, warmup_steps=2),
        data=Data(
            path=f"data/tiny_rlvr_{kind.name}",
            tokenizer=f"runs/mellum2_tiny_sft_{kind.name}/tokenizer",
            sequence_length=256,
            workers=0,
            feed="rollouts",
        ),
        rl=Rl(objective=objective, eval_answers=1),
        logging=Logging(log_interval=1, eval_interval=10, eval_iterations=0),
        save_interval=10,
        hardware={
            "": Hardware(label="two CPU ranks", layout=Layout(ep=2), source="ours: two CPU cores")
        },
        sources={
            **STAGE_SOURCES,
            "architecture": LONG_CONTEXT.sources["architecture"],
            "optimizer.lr": "ours: a hundred times the 12B's, for so small a model",
            "optimizer.min_lr": "report §5.2: a tenth of the peak",
            "layout": TWO_RANKS,
            "schedule": "report §5.2; lengths are ours, for minutes on two cores",
            "schedule.train_samples": "ours: 20 steps",
            "schedule.warmup_samples": "ours: 2 steps",
            "schedule.batch_schedule": "ours: as much as two cores can do",
            "schedule.micro_batch_size": "ours: one answer",
            "data.sequence_length": "ours: short answers",
            "rl.objective.group_size": "ours: as much as two cores can do",
            "rl.objective.prompts": "ours: as much as two cores can do",
            "rl.objective.max_tokens": "ours: in the proportion of the two kinds (report §5.2)",
            "rl.ahead": "ours: synchronous",
            "rl.engine": "ours: in each rank",
        },
    )


TINY = StageFamily(
    name="mellum2_tiny",
    title="Tiny Mellum 2",
    stages=(
        *PHASES,
        LONG_CONTEXT,
        *map(_sft, (sft.INSTRUCT, sft.THINKING)),
        *map(_rlvr, (rlvr.INSTRUCT, rlvr.THINKING)),
    ),
)


def quickstart() -> Run:
    """Return ``mellum2_tiny_pretrain``: one pre-training without phases, in five minutes."""
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
                "report §3: WHD and a batch that doubles; "
                "lengths are ours, for five minutes on two idle cores"
            ),
            "precision": BF16,
            **OPERATION_SOURCES,
        },
    )
