"""Supervised fine-tuning: instruct and thinking, each from the long-context model (report §5.1).

Loss, step and loop are those of pre-training; the data are packs of conversations with loss masks,
from ``mellum2 data chat``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import Data, Logging, Loss, Optimizer, Precision, Schedule
from mellum2_megatron.recipes.hardware import Hardware, cluster
from mellum2_megatron.recipes.long_context import CP, LONG_CONTEXT, SEQUENCE_LENGTH
from mellum2_megatron.recipes.stage import Stage

SEQUENCES, EPOCHS, WARMUP_STEPS = 64, 3, 100
"""Sequences a step, passes over the packs, and steps of warmup (report §5.1)."""

LOSS = Loss(aux_loss_coef=1e-4, per_token=True)
"""Loss of both kinds (report §5.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of fine-tuning.

    Attributes:
        name: mode of ``mellum2 data chat``, and end of the stage's name.
        packs: packed sequences of the report's data.
        tokens: tokens of all epochs, for the recipe's description.
        learnt: part of a conversation that is learnt, for the same.
    """

    name: str
    packs: int
    tokens: str
    learnt: str

    @property
    def steps(self) -> int:
        """Steps of all epochs; the last one is completed from a further epoch."""
        return -(-EPOCHS * self.packs // SEQUENCES)


INSTRUCT = Kind(name="instruct", packs=119_334, tokens="47B", learnt="all answers")
THINKING = Kind(name="thinking", packs=425_322, tokens="167B", learnt="last answer and thoughts")

SOURCES = {
    **LONG_CONTEXT.sources,
    "layout": "report §5.1: EP 8 and CP 8",
    "layout.dp": "report §5.1: 16 nodes of 8 H200",
    "optimizer.lr": "report §5.1",
    "optimizer.min_lr": "report §5.1",
    "loss.aux_loss_coef": "report §5.1",
    "loss.z_loss_coef": "report §3; §5.1 names no other",
    "loss.per_token": (
        "ours: masks leave ranks and micro-batches unequal numbers of tokens, and a mean of their "
        "means would weigh tokens by their neighbours"
    ),
    "schedule": "report §5.1: cosine, 3 epochs",
    "schedule.warmup_samples": "report §5.1: 100 steps",
    "schedule.batch_schedule": "report §5.1: 64 sequences a step",
    "data.phase": "ours: packs of `mellum2 data chat`, not of a corpus plan",
    "data.document_attention": "ours: a conversation sees itself alone, as in use",
    "data.sequence_length": "report §5.1: packs of 131,072 tokens",
    "checkpoint.load": "report §5.1: from Base, the long-context model; ours: weights only",
}


def sft_stage(
    kind: Kind,
    *,
    architecture: Mellum2Architecture,
    optimizer: Optimizer,
    schedule: Schedule,
    precision: Precision,
    data: Data,
    logging: Logging,
    save_interval: int,
    hardware: Mapping[str, Hardware],
    sources: Mapping[str, str],
    tokens: str,
    keep_last: int | None = None,
    retain_interval: int | None = None,
) -> Stage:
    """Return one kind of fine-tuning as a stage.

    Args:
        kind: the kind.
        architecture: the long-context model.
        optimizer, schedule, precision, data, logging, save_interval, hardware, keep_last,
            retain_interval: see `Stage`.
        sources: overrides of `SOURCES`.
        tokens: number and length of the tokens, for the recipe's description.
    """
    return Stage(
        name=f"sft_{kind.name}",
        summary=f"SFT, {kind.name} ({tokens}; {kind.learnt})",
        architecture=architecture,
        optimizer=optimizer,
        loss=LOSS,
        schedule=schedule,
        precision=precision,
        data=data,
        logging=logging,
        save_interval=save_interval,
        keep_last=keep_last,
        retain_interval=retain_interval,
        start="weights",
        after=LONG_CONTEXT.name,
        hardware=hardware,
        sources={**SOURCES, **sources},
    )


def _of_12b(kind: Kind) -> Stage:
    return sft_stage(
        kind,
        architecture=LONG_CONTEXT.architecture,
        optimizer=Optimizer(lr=3e-5, min_lr=3e-6),
        schedule=Schedule.from_steps(
            style="cosine",
            train_steps=kind.steps,
            warmup_steps=WARMUP_STEPS,
            batch_sizes=((0, SEQUENCES),),
            micro_batch_size=1,  # CP ranks already share one sequence
        ),
        precision=Precision(compute="fp8"),
        data=Data(
            path=f"data/sft_{kind.name}", sequence_length=SEQUENCE_LENGTH, document_attention=True
        ),
        logging=Logging(log_interval=10, eval_interval=500, eval_iterations=4),
        save_interval=500,
        hardware=cluster(
            {
                128: "report §5.1: 16 nodes of 8 H200",
                8: "ours: the same training on one node",
            },
            default=128,
            cp=CP,
        ),
        keep_last=3,
        retain_interval=1000,
        sources={
            "schedule.train_samples": (
                f"report §5.1: 3 epochs of {kind.packs:,} packed sequences, rounded up to a step"
            )
        },
        tokens=f"{kind.tokens} tokens at 128K",
    )


SFT = tuple(map(_of_12b, (INSTRUCT, THINKING)))
"""Both kinds of the 12B."""
