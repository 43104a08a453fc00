"""A stage of a training as one value, and the function that makes a run of it.

A `StageFamily` is a training at one size, such as the 12B: stages that follow each other. A
`Stage` holds everything that differs between stages. To add a stage, write its value in a module
of its own and add it to ``stages`` of each family.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import (
    Checkpoint,
    Data,
    Logging,
    Loss,
    Optimizer,
    Precision,
    Rl,
    Run,
    Schedule,
    Stability,
)
from mellum2_megatron.recipes.hardware import Hardware

PLAN = "data/mellum2"
"""Folder of the 12B's corpus plan (``mellum2 data run``), which has a phase for each stage."""

DOCUMENTS = (
    "ours: each document is seen as it will be in use; the report does not say "
    "whether attention crossed the documents of a sequence"
)
"""Source of ``data.document_attention=True``."""

BF16_LAYERS = "ours: the report names no layer that stays in BF16"

OPERATION_SOURCES = {
    "execution": "ours: nothing traded; the report does not say",
    "stability": "ours: report §3.6 describes spikes and their cause, but no rule for such steps",
    **dict.fromkeys(
        ("data", "logging", "checkpoint", "seed", "seed_weights", "backend"),
        "ours: operation of the run",
    ),
    **dict.fromkeys(("timeout_minutes", "setup_timeout_minutes"), "ours: operation of the run"),
    "rl": "not used: the run learns from data",
}
"""Sources of the sections that the report leaves open; part of `COMMON_SOURCES`."""

LENGTHS = (
    "schedule.train_samples",
    "schedule.horizon_samples",
    "schedule.warmup_samples",
    "schedule.decay_samples",
    "schedule.batch_schedule",
)
"""Keys of a schedule that a smaller training scales, for one source of all five."""

COMMON_SOURCES = {
    "architecture": "report §2, table Architecture configuration; released config.json",
    "layout.dispatcher": "ours: dropless all-to-all; the report names none",
    **dict.fromkeys(
        (
            "layout.dispatcher_backend",
            "layout.dispatcher_sms",
            "layout.overlap_expert_comm",
            "layout.delay_wgrad",
        ),
        "ours: Megatron's plain exchange; the report names none",
    ),
    "optimizer": "report §3, App. B",
    "optimizer.muon_split_qkv": "Megatron's default; the report does not say",
    "optimizer.muon_split_gate_up": "Megatron's default; the report does not say",
    "optimizer.muon_router": "Megatron's default; the report does not say",
    "optimizer.muon_mtp_projection": "Megatron's default; the report does not say",
    "optimizer.muon_dense_shards": "Megatron's default; the report does not say",
    "optimizer.muon_extra_scale": "report §3, after Moonlight (arXiv 2502.16982, §2.2)",
    "loss": "report §3",
    "loss.aux_loss_gradient": "Megatron's, as in the report's stack; see docs/layouts.md",
    "loss.mtp_factor": "report §2",
    "loss.head_chunk": "ours: less memory, the same losses and gradients to one rounding",
    "precision": "report §3: BF16 + FP8 hybrid, tensorwise, gradients reduced in FP32",
    "precision.fp8_param_gather": (
        "ours: with Muon, megatron-core 0.19.2 gathers wrong FP8 weights (rule muon-gathers-bf16)"
    ),
    "precision.bf16_first_layers": BF16_LAYERS,
    "precision.bf16_last_layers": BF16_LAYERS,
    "precision.bf16_mtp_projection": BF16_LAYERS,
    **OPERATION_SOURCES,
}
"""Sources that all stages share; `Stage.sources` overrides them key by key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a training at one size.

    Attributes:
        name: part of the recipe's name, such as ``pretrain_phase1``.
        summary: stage, tokens and schedule in one phrase, for the recipe's description.
        architecture: the model, with this stage's context length and rotation.
        optimizer, schedule, precision, data, logging: sections of the run.
        loss: another section; default the report's of pre-training.
        save_interval: optimizer steps between two checkpoints.
        keep_last, retain_interval: checkpoints to keep, see `Checkpoint`; default all.
        start: state taken from the stage before. ``new``: none. ``continue``: all of it, under one
            schedule. ``weights``: the weights alone, under a new schedule.
        hardware: machines, by the ending of the recipe's name, such as ``_8gpu_h200_fp8``. An empty
            ending gives the short name.
        sources: sources of the values, by key; they override `COMMON_SOURCES`.
        after: name of the stage to start from; default None: the one before in the family.
        rl: section of reinforcement learning, default unused.
        stability: another section, default `Stability`'s.
    """

    name: str
    summary: str
    architecture: Mellum2Architecture
    optimizer: Optimizer
    schedule: Schedule
    precision: Precision
    data: Data
    logging: Logging
    save_interval: int
    start: Literal["new", "continue", "weights"]
    hardware: Mapping[str, Hardware]
    sources: Mapping[str, str]
    loss: Loss = Loss()  # noqa: RUF009  # frozen
    after: str | None = None
    keep_last: int | None = None
    retain_interval: int | None = None
    rl: Rl = Rl()  # noqa: RUF009  # frozen
    stability: Stability = Stability()  # noqa: RUF009


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFamily:
    """A training at one size.

    Attributes:
        name: beginning of the recipes' names.
        title: beginning of the recipes' descriptions.
        stages: stages in order; each starts from the one before it, or from `Stage.after`.
    """

    name: str
    title: str
    stages: tuple[Stage, ...]


def stage_recipes(family: StageFamily) -> dict[str, Callable[[], Run]]:
    """Return the family's recipes by name: each stage on each of its `Stage.hardware`."""
    recipes: dict[str, Callable[[], Run]] = {}
    before: Stage | None = None
    named = {stage.name: stage for stage in family.stages}
    for stage in family.stages:
        if stage.after is not None:
            before = named[stage.after]
        for ending in stage.hardware:
            recipes[f"{family.name}_{stage.name}{ending}"] = functools.partial(
                stage_run, family, stage, before, ending
            )
        before = stage
    return recipes


def stage_run(family: StageFamily, stage: Stage, before: Stage | None, ending: str) -> Run:
    """Return one stage as a run.

    Args:
        family: the training.
        stage: one of its stages.
        before: the stage before it; None for the first. It needs the same ``ending``.
        ending: key of ``stage.hardware``, and end of the recipe's name.
    """
    hardware = stage.hardware[ending]
    # Default folder of the recipe with the same ending. The empty ending is 256 GPUs in the phases
    # and 128 in long context.
    schedule = stage.schedule
    if hardware.micro_batch_size is not None:
        schedule = replace(schedule, micro_batch_size=hardware.micro_batch_size)
    folder = f"runs/{family.name}_{before.name}{ending}" if before else None
    return Run(
        name=f"{family.name}_{stage.name}{ending}",
        description=f"{family.title}, {stage.summary}, on {hardware.label}.",
        architecture=stage.architecture,
        layout=hardware.layout,
        optimizer=replace(stage.optimizer, muon_dense_shards=hardware.muon_dense_shards),
        loss=stage.loss,
        schedule=schedule,
        precision=hardware.precision or stage.precision,
        execution=hardware.execution,
        data=stage.data,
        rl=stage.rl,
        stability=stage.stability,
        logging=stage.logging,
        checkpoint=Checkpoint(
            save_interval=stage.save_interval,
            keep_last=stage.keep_last,
            retain_interval=stage.retain_interval,
            continue_from=folder if stage.start == "continue" else None,
            load=folder if stage.start == "weights" else None,
        ),
        # Later sources win.
        sources={
            **COMMON_SOURCES,
            **stage.sources,
            "layout.dp": hardware.source,
            **hardware.sources,
        },
    )
