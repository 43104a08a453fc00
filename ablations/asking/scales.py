"""The three sizes of an ablation: the same family of models, from a CPU's minute to the report's.

All three keep the family's proportions: three sliding layers and a full one in turn, a window of an
eighth of the sequence, one of eight experts active, eight query heads for a key head, experts of
0.39 of the width, one MTP layer, WHD and Muon.
"""

from __future__ import annotations

from collections.abc import Mapping

from ablations.asking.study import Base, DataSet, Scale
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import (
    Checkpoint,
    Data,
    Device,
    Layout,
    Logging,
    Optimizer,
    Precision,
    Run,
    Schedule,
)

_12B = Mellum2Architecture.preset("mellum2-12b")
_NEVER = 1_000_000_000
"""Steps between two checkpoints of a run that saves at its end only."""

TINY_STEPS = 120
"""Optimizer steps of a run at the tiny scale."""


def tiny() -> Run:
    """Return a training of one CPU process and about a minute, on a quarter of a million tokens.

    It shows that an arm runs and is wired; its verdicts hold at this size alone.
    """
    return Run(
        name="ablation_tiny",
        description="Ablations on one CPU process, about a minute a run.",
        architecture=_12B.replace(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=16,
            moe_intermediate_size=48,
            num_experts=16,
            num_experts_per_tok=2,
            sliding_window=32,
            max_position_embeddings=256,
            eos_token_id=1,
        ),
        layout=Layout(dp=1),
        optimizer=Optimizer(lr=4e-3, overlap_grad_reduce=False, overlap_param_gather=False),
        schedule=Schedule.from_steps(
            train_steps=TINY_STEPS,
            warmup_steps=TINY_STEPS // 10,
            decay_steps=TINY_STEPS // 4,
            batch_sizes=((0, 8),),
            micro_batch_size=8,
        ),
        data=Data(path="data/ablations", sequence_length=256, workers=0),
        logging=Logging(
            log_interval=5,
            # Once, at the end, over more than half of the held-out tokens.
            eval_interval=TINY_STEPS,
            eval_iterations=56,
            eval_batch_size=8,
            validation_documents=True,
            tensorboard=False,
        ),
        checkpoint=Checkpoint(save_interval=_NEVER),
        seed_weights="by_name",
    )


def proxy() -> Run:
    """Return a training of one GPU and some hours: 1.2B parameters, 2.1B tokens."""
    return Run(
        name="ablation_proxy",
        description="Ablations on one GPU, some hours a run.",
        architecture=_12B.replace(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=16,
            num_key_value_heads=2,
            moe_intermediate_size=384,
        ),
        layout=Layout(dp=1),
        optimizer=Optimizer(lr=1e-3),
        schedule=Schedule.from_steps(
            train_steps=4_000,
            warmup_steps=200,
            decay_steps=800,
            batch_sizes=((0, 64),),
            micro_batch_size=2,
        ),
        data=Data(path="data/phase1", sequence_length=8192),
        logging=Logging(
            log_interval=20, eval_interval=1_000, eval_iterations=8, validation_documents=True
        ),
        checkpoint=Checkpoint(save_interval=1_000, keep_last=1),
        seed_weights="by_name",
    )


def full() -> Run:
    """Return a training of the released model on 105B tokens, as in the report's ablations (§6)."""
    return Run(
        name="ablation_full",
        description="Ablations as the report's: the 12B on 105B tokens.",
        architecture=_12B,
        layout=Layout(ep=8, dp=64),
        optimizer=Optimizer(),
        schedule=Schedule.from_steps(
            train_steps=6_259,
            warmup_steps=300,
            decay_steps=950,
            batch_sizes=((0, 2_048),),
            micro_batch_size=2,
        ),
        precision=Precision(compute="fp8"),
        data=Data(path="data/phase1", sequence_length=8192),
        logging=Logging(
            log_interval=10, eval_interval=1_000, eval_iterations=4, validation_documents=True
        ),
        checkpoint=Checkpoint(save_interval=500, keep_last=2),
        seed_weights="by_name",
    )


BASES: Mapping[Scale, Base] = {"tiny": tiny, "proxy": proxy, "full": full}
"""Base of each scale, unless a study has its own."""

TINY_DATA = DataSet(
    name="code",
    path="data/ablations",
    # Many short documents: intervals over documents need a hundred of them.
    command="mellum2 data prepare --output {path} --format megatron --max-megabytes 12 "
    "--max-document-megabytes 0.016 --valid-fraction 0.03 --vocab-size 1024",
)
"""Python sources of this machine, the data of the tiny scale."""

DEVICE: Mapping[Scale, Device] = {"tiny": "cpu", "proxy": "cuda", "full": "cuda"}
"""Device that a scale is meant for."""
