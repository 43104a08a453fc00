"""Every stage of the training at a size that two CPU cores run in a minute or two: the same stages,
the same functions.

mellum2 train mellum2_tiny_pretrain_phase1 && mellum2 train mellum2_tiny_pretrain_phase2 && ..
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.architecture.mellum2 import RopeParameters
from mellum2_megatron.config import Data, Layout, Logging, Optimizer, Precision, Run, Schedule
from mellum2_megatron.recipes.hardware import Hardware
from mellum2_megatron.recipes.pretraining import SCHEDULE_KEYS, Training, stage_recipes

DATA = "data/quickstart"
SEQUENCE_LENGTH = 256
EXTENSION = 4
"""How much longer context and sequences become; sixteen times in the report (§4)."""
LONG_SEQUENCE_LENGTH = EXTENSION * SEQUENCE_LENGTH

TWO_RANKS = Hardware(
    suffix="2cpu",
    text="two CPU ranks",
    layout=Layout(ep=2),
    long_layout=Layout(ep=2, cp=2),
    source="ours: two CPU cores",
    long_source="ours: two CPU cores",
)


def tiny_recipes() -> dict[str, Callable[[], Run]]:
    """Return the recipes of the tiny stages by name."""
    return stage_recipes(_training(), phases={"": TWO_RANKS}, long={"": TWO_RANKS})


def _training() -> Training:
    native = Mellum2Architecture.preset("mellum2-tiny")
    whole = Schedule.from_steps(
        train_steps=100,
        warmup_steps=8,
        decay_steps=15,
        batch_sizes=((0, 4), (8, 8)),
        micro_batch_size=2,
    )
    ends = tuple(map(whole.samples, (59, 84, 100)))
    lengths = "as in the report (report §3) in proportion, in a few minutes on two cores"
    return Training(
        name="mellum2_tiny",
        title="Tiny Mellum 2",
        architecture=native,
        long_architecture=_extended(native),
        schedule=whole,
        ends=ends,
        tokens=tuple(
            f"{(end - first) * SEQUENCE_LENGTH // 1000}K tokens"
            for first, end in zip((0, *ends), ends, strict=False)
        ),
        long_schedule=Schedule.from_steps(
            train_steps=20, warmup_steps=2, decay_steps=5, batch_sizes=((0, 2),), micro_batch_size=1
        ),
        long_lr=2e-4,
        optimizer=Optimizer(lr=2e-3, overlap_grad_reduce=False, overlap_param_gather=False),
        precision=Precision(),
        data=tuple(
            Data(
                path=DATA,
                sequence_length=SEQUENCE_LENGTH,
                workers=0,
                first_sample=first,
                seed=number,
            )
            for number, first in enumerate((0, *ends[:-1]), 1)
        ),
        long_data=Data(path=DATA, sequence_length=LONG_SEQUENCE_LENGTH, workers=0),
        logging=Logging(log_interval=2, eval_interval=20, eval_iterations=4),
        long_logging=Logging(log_interval=2, eval_interval=10, eval_iterations=2),
        save_interval=20,
        long_save_interval=10,
        sources={
            "architecture": "preset mellum2-tiny: the report's proportions at a size two CPU cores can train",
            "architecture.max_position_embeddings": "ours: eight windows",
            "optimizer.overlap_grad_reduce": "nothing to hide behind on a CPU",
            "optimizer.overlap_param_gather": "nothing to hide behind on a CPU",
            "precision": "BF16: FP8 needs a GPU",
            "precision.fp8_param_gather": "no FP8",
            "schedule.micro_batch_size": "ours: two ranks, and a batch that grows",
            "data.seed": "ours: the phases share one corpus, each in an order of its own",
        },
        phase_sources={
            "optimizer.lr": "tuned at this size and batch; the report's 3e-4 is for the 12B",
            "layout": "two ranks share the experts, as eight do in the report (report §3)",
            "data.sequence_length": "ours: half the native context, four windows",
            **dict.fromkeys(SCHEDULE_KEYS, lengths),
        },
        long_sources={
            "architecture.max_position_embeddings": "ours: four times the native context; report §4: sixteen times",
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


def _extended(native: Mellum2Architecture) -> Mellum2Architecture:
    """Return the model with YaRN on its full-attention layers, scaled as the released one is."""
    rope = RopeParameters(
        rope_type="yarn",
        rope_theta=native.rope_full_attention.rope_theta,
        factor=float(EXTENSION),
        original_max_position_embeddings=native.max_position_embeddings,
        attention_factor=0.1 * math.log(EXTENSION) + 1,
    )
    context = EXTENSION * native.max_position_embeddings
    return native.replace(max_position_embeddings=context, rope_full_attention=rope)
