"""Recipes: functions that return a complete `Run`, every value of theirs with its source."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.config import Checkpoint, Data, Layout, Logging, Optimizer, Run, Schedule
from mellum2_megatron.recipes.pretraining import OPERATION, STABILITY, pretraining_recipes
from mellum2_megatron.recipes.tiny import tiny_recipes

_RECIPES: dict[str, Callable[..., Run]] = pretraining_recipes() | tiny_recipes()


def register(function: Callable[..., Run]) -> Callable[..., Run]:
    """Make ``function`` available to `recipe` under its own name; its docstring's first line is the
    description."""
    _RECIPES[function.__name__] = function
    return function


def recipe_names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted."""
    return tuple(sorted(_RECIPES))


def describe_recipes() -> dict[str, str]:
    """Return ``name -> one line`` for every recipe, sorted by name."""
    return {name: recipe(name).description for name in recipe_names()}


def recipe(name: str, **choices: Any) -> Run:
    """Return the run of recipe ``name``.

    Args:
        name: one of `recipe_names`.
        **choices: keyword arguments of that recipe's function.

    Raises:
        InputError: an unknown recipe or choice; the message names the nearest.
    """
    if name not in _RECIPES:
        raise InputError(
            f"recipe {name!r}", rule="there is no such recipe", fix=nearest(name, _RECIPES)
        )
    function = _RECIPES[name]
    known = inspect.signature(function).parameters
    for choice in choices:
        if choice not in known:
            rule = f"recipe {name} has no such choice"
            raise InputError(
                f"{choice}={choices[choice]!r}",
                rule=rule,
                fix=nearest(choice, known) if known else "drop it",
            )
    return function(**choices)


@register
def mellum2_tiny_pretrain() -> Run:
    """A 4-layer Mellum 2 that learns Python source on two CPU cores in minutes; every part of the
    12B is in it."""
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
            "stability": STABILITY,
            "data": OPERATION,
            "logging": OPERATION,
            "checkpoint": OPERATION,
            "seed": OPERATION,
            "backend": OPERATION,
            "timeout_minutes": OPERATION,
        },
    )


def _description(function: Callable[..., Run]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]
