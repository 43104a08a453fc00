"""A stage of a training as one value, and the one function that makes a run of it.

A `StageFamily` is a training at one size, such as the 12B: stages that follow each other. A
`Stage` holds all in which they differ. To add a stage, write its value in a module of its own and
put it into the families' ``stages``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import (
    Checkpoint,
    Data,
    Logging,
    Optimizer,
    Precision,
    Run,
    Schedule,
)
from mellum2_megatron.recipes.hardware import Hardware

OPERATION = "ours: how the run is operated"
STABILITY = (
    "ours: report §3.6 tells of spikes and their cause, not of a rule for steps that have one"
)
BF16_LAYERS = "the report names no layer that stays in BF16"

COMMON_SOURCES = {
    "architecture": "report §2, table Architecture configuration; released config.json",
    "layout.dispatcher": "ours: dropless all-to-all; the report names none",
    "optimizer": "report §3, App. B",
    "optimizer.muon_split_qkv": "Megatron's default; the report does not say",
    "optimizer.muon_split_gate_up": "Megatron's way; the report does not say",
    "optimizer.muon_router": "Megatron's way; the report does not say",
    "optimizer.muon_mtp_projection": "Megatron's way; the report does not say",
    "optimizer.muon_extra_scale": "report §3, after Moonlight (arXiv 2502.16982, §2.2)",
    "loss": "report §3",
    "loss.aux_loss_gradient": "Megatron's, as the report's stack had it: see docs/layouts.md",
    "loss.mtp_factor": "report §2",
    "precision": "report §3: BF16 + FP8 hybrid, tensorwise, gradients reduced in FP32",
    "precision.fp8_param_gather": (
        "not the report's: wrong beside Muon in megatron-core 0.19.2, see rules.py"
    ),
    "precision.bf16_first_layers": BF16_LAYERS,
    "precision.bf16_last_layers": BF16_LAYERS,
    "precision.bf16_mtp_projection": BF16_LAYERS,
    "stability": STABILITY,
    "data": OPERATION,
    "logging": OPERATION,
    "checkpoint": OPERATION,
    "seed": OPERATION,
    "backend": OPERATION,
    "timeout_minutes": OPERATION,
}
"""Sources that the stages share; a stage's own `Stage.sources` override them key by key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a training at one size.

    Attributes:
        name: name of the stage inside a recipe's name, such as ``pretrain_phase1``.
        summary: stage, tokens and schedule in one phrase, for the description.
        architecture: the model, with this stage's context length and rotation.
        optimizer, schedule, precision, data, logging: sections of the run.
        save_interval: optimizer steps between two checkpoints.
        start: state taken from the stage before. ``new``: none. ``continue``: all of it, under one
            schedule. ``weights``: the weights alone, under a new schedule.
        hardware: machines by the ending that they give the recipe's name. An empty ending is the
            short name.
        sources: source of a value by its key; overrides `COMMON_SOURCES`.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFamily:
    """A training at one size.

    Attributes:
        name: beginning of its recipes' names.
        title: beginning of their descriptions.
        stages: stages in order; each starts from the one before it.
    """

    name: str
    title: str
    stages: tuple[Stage, ...]


def stage_recipes(family: StageFamily) -> dict[str, Callable[[], Run]]:
    """Return the family's recipes by name: every stage on every hardware that it lists."""
    recipes: dict[str, Callable[[], Run]] = {}
    before: Stage | None = None
    for stage in family.stages:
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
        before: the stage before it, on the same hardware; None for the first.
        ending: key of ``stage.hardware``.
    """
    hardware = stage.hardware[ending]
    folder = f"runs/{family.name}_{before.name}{ending}" if before else None
    return Run(
        name=f"{family.name}_{stage.name}{ending}",
        description=f"{family.title}, {stage.summary}, on {hardware.label}.",
        architecture=stage.architecture,
        layout=hardware.layout,
        optimizer=stage.optimizer,
        schedule=stage.schedule,
        precision=stage.precision,
        data=stage.data,
        logging=stage.logging,
        checkpoint=Checkpoint(
            save_interval=stage.save_interval,
            continue_from=folder if stage.start == "continue" else None,
            load=folder if stage.start == "weights" else None,
        ),
        # Later sources win. The number of machines is the only value that hardware decides.
        sources={**COMMON_SOURCES, **stage.sources, "layout.dp": hardware.source},
    )
