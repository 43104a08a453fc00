"""The table of recipes: functions by name, each returning a complete `Run`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.config import Run
from mellum2_megatron.recipes.four_layers import FOUR_LAYERS, four_layer_pretraining
from mellum2_megatron.recipes.long_context import LONG_CONTEXT
from mellum2_megatron.recipes.pretraining import PRETRAINING
from mellum2_megatron.recipes.stage import StageFamily, stage_recipes
from mellum2_megatron.recipes.tiny import TINY, quickstart

MELLUM2_12B = StageFamily(
    name="mellum2_12b", title="Mellum 2 12B", stages=(*PRETRAINING, LONG_CONTEXT)
)

# A table, not decorators: its content does not depend on which modules are imported.
_RECIPES: dict[str, Callable[..., Run]] = {
    **stage_recipes(MELLUM2_12B),
    **stage_recipes(FOUR_LAYERS),
    "mellum2_4layer_pretrain_1gpu_h200_fp8": four_layer_pretraining,
    **stage_recipes(TINY),
    "mellum2_tiny_pretrain": quickstart,
}


def register(function: Callable[..., Run]) -> Callable[..., Run]:
    """Add ``function`` to the recipes under its own name: a decorator for outside this package.

    A recipe of the same name is replaced.
    """
    _RECIPES[function.__name__] = function
    return function


def recipe_names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted."""
    return tuple(sorted(_RECIPES))


def describe_recipes() -> dict[str, str]:
    """Return every recipe's description (one line) by name, sorted by name."""
    return {name: recipe(name).description for name in recipe_names()}


def recipe(name: str, **choices: Any) -> Run:
    """Return the run of recipe ``name``.

    Args:
        name: one of `recipe_names`.
        **choices: keyword arguments of the recipe's function.

    Raises:
        InputError: an unknown recipe or choice; the message names the nearest.
    """
    if name not in _RECIPES:
        raise InputError(
            f"recipe {name!r}", rule="there is no such recipe", fix=nearest(name, _RECIPES)
        )
    function = _RECIPES[name]
    known = inspect.signature(function).parameters
    for choice, value in choices.items():
        if choice not in known:
            raise InputError(
                f"{choice}={value!r}",
                rule=f"recipe {name} has no such choice",
                fix=nearest(choice, known) if known else "drop it",
            )
    return function(**choices)
