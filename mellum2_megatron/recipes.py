"""Recipes: functions that return a complete `Run`, every value of theirs with its source."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.errors import InputError, nearest
from mellum2_megatron.layout import Layout
from mellum2_megatron.optimizer import Loss, Optimizer
from mellum2_megatron.precision import Precision
from mellum2_megatron.run import Checkpoint, Data, Logging, Run
from mellum2_megatron.schedule import Schedule

_RECIPES: dict[str, Callable[..., Run]] = {}
_OPERATION = "ours: how the run is operated"

SEQUENCE_LENGTH = 8192
"""Tokens a sequence up to the long-context stage (report §2)."""

TRAIN_STEPS = 323_459
"""Optimizer steps of the three phases (report App. B)."""

PHASE_TOKENS = (6.18e12, 2.79e12, 1.69e12)
"""Tokens of Foundation, Quality Uplift and Capability Sharpening (report §3)."""

RAMP_STEPS = 12_128
"""Steps at 2,048 sequences before the batch doubles.

The report gives neither the length nor the shape of the ramp. With one step from 2,048 to 4,096 its two totals leave no
choice: 323,459 steps see 10.65T tokens (report §3) only if about 12,128 of them were half as large.
"""


def register(function: Callable[..., Run]) -> Callable[..., Run]:
    """Make ``function`` available to `recipe` under its own name; its docstring's first line is the description."""
    _RECIPES[function.__name__] = function
    return function


def recipe_names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted."""
    return tuple(sorted(_RECIPES))


def describe_recipes() -> dict[str, str]:
    """Return ``name -> one line`` for every recipe, sorted by name."""
    return {name: _description(_RECIPES[name]) for name in recipe_names()}


def recipe(name: str, **choices: Any) -> Run:
    """Return the run of recipe ``name``.

    Args:
        name: one of `recipe_names`.
        **choices: keyword arguments of that recipe's function.

    Raises:
        InputError: an unknown recipe or choice; the message names the nearest.
    """
    if name not in _RECIPES:
        raise InputError(f"recipe {name!r}", rule="there is no such recipe", fix=nearest(name, _RECIPES))
    function = _RECIPES[name]
    known = inspect.signature(function).parameters
    for choice in choices:
        if choice not in known:
            rule = f"recipe {name} has no such choice"
            raise InputError(
                f"{choice}={choices[choice]!r}", rule=rule, fix=nearest(choice, known) if known else "drop it"
            )
    return function(**choices)


@register
def mellum2_tiny_pretrain() -> Run:
    """A 4-layer Mellum 2 that learns Python source on two CPU cores in minutes; every part of the 12B is in it."""
    batch = 16
    return Run(
        name="mellum2_tiny_pretrain",
        description=_description(mellum2_tiny_pretrain),
        architecture=Mellum2Architecture.preset("mellum2-tiny"),
        layout=Layout(ep=2),
        optimizer=Optimizer(lr=2e-3, overlap_grad_reduce=False, overlap_param_gather=False),
        schedule=Schedule.from_steps(
            train_steps=300,
            warmup_steps=20,
            decay_steps=100,
            batch_sizes=((0, batch // 2), (20, batch)),
            micro_batch_size=4,
        ),
        data=Data(path="data/quickstart", sequence_length=256, workers=0),
        logging=Logging(log_interval=5, eval_interval=50, eval_iterations=4),
        checkpoint=Checkpoint(save_interval=100),
        sources={
            "architecture": "preset mellum2-tiny: the report's proportions at a size two CPU cores can train",
            "layout": "two ranks share the experts, as eight do in the report (report §3)",
            "optimizer": "report §3",
            "optimizer.lr": "tuned at this size and batch; the report's 3e-4 is for the 12B",
            "optimizer.overlap_grad_reduce": "nothing to hide behind on a CPU",
            "optimizer.overlap_param_gather": "nothing to hide behind on a CPU",
            "loss": "report §2, §3",
            "schedule": "WHD and a batch that doubles, as in the report (report §3), in ten minutes on two cores",
            "precision": "BF16: FP8 needs a GPU",
            "data": _OPERATION,
            "logging": _OPERATION,
            "checkpoint": _OPERATION,
            "seed": _OPERATION,
            "backend": _OPERATION,
        },
    )


@register
def mellum2_12b_pretrain_phase1() -> Run:
    """Mellum 2 12B, phase 1 of 3 (Foundation, 6.18T tokens at 8K): warmup, batch ramp and hold, on 256 GPUs."""
    whole = Schedule.from_steps(
        train_steps=TRAIN_STEPS,
        warmup_steps=2_000,
        decay_steps=49_306,
        batch_sizes=((0, 2048), (RAMP_STEPS, 4096)),
        micro_batch_size=2,
    )
    phase_end = whole.samples(whole.steps(round(PHASE_TOKENS[0] / SEQUENCE_LENGTH)))
    return Run(
        name="mellum2_12b_pretrain_phase1",
        description=_description(mellum2_12b_pretrain_phase1),
        architecture=Mellum2Architecture.preset("mellum2-12b"),
        layout=Layout(ep=8, dp=256),
        optimizer=Optimizer(),
        loss=Loss(),
        schedule=Schedule(
            train_samples=phase_end,
            horizon_samples=whole.train_samples,
            warmup_samples=whole.warmup_samples,
            decay_samples=whole.decay_samples,
            batch_schedule=whole.batch_schedule,
            micro_batch_size=whole.micro_batch_size,
        ),
        precision=Precision(compute="fp8"),
        data=Data(path="data/phase1", sequence_length=SEQUENCE_LENGTH),
        logging=Logging(log_interval=10, eval_interval=1000, eval_iterations=8),
        checkpoint=Checkpoint(save_interval=1000),
        sources={
            "architecture": "report §2, table Architecture configuration; released config.json",
            "architecture.max_position_embeddings": "report §2: 8,192 native; released Base-Pretrain config.json",
            "layout": "report §3: EP 8, TP 1, PP 1, 32 nodes of 8 H200",
            "layout.dispatcher": "ours: dropless all-to-all; the report names none",
            "optimizer": "report §3, App. B",
            "optimizer.muon_split_qkv": "Megatron's default; the report does not say",
            "optimizer.muon_extra_scale": "report §3, after Moonlight (arXiv 2502.16982, §2.2)",
            "loss": "report §3",
            "loss.mtp_factor": "report §2",
            "schedule.style": "report §3: WHD",
            "schedule.train_samples": "report §3: 6.18T tokens in phase 1, rounded up to a whole step",
            "schedule.horizon_samples": "report App. B: 323,459 steps, of which RAMP_STEPS at 2,048 sequences",
            "schedule.warmup_samples": "report App. B: 2,000 steps, all of them at 2,048 sequences",
            "schedule.decay_samples": "report App. B: the last 49,306 steps, at 4,096 sequences",
            "schedule.batch_schedule": "report §3: 2,048 to 4,096; when follows from steps and tokens, see RAMP_STEPS",
            "schedule.micro_batch_size": "report App. B",
            "precision": "report §3: BF16 + FP8 hybrid, tensorwise, gradients reduced in FP32",
            "precision.fp8_param_gather": "not the report's: wrong beside Muon in megatron-core 0.19.2, see rules.py",
            "data": _OPERATION,
            "data.sequence_length": "report §3: packed into 8,192 tokens",
            "logging": _OPERATION,
            "checkpoint": _OPERATION,
            "seed": _OPERATION,
            "backend": _OPERATION,
        },
    )


def _description(function: Callable[..., Run]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]
