"""The table of recipes: functions by name, each returning a complete `Run`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.model_folders import RUN_FILE, kind_of
from mellum2_megatron.config import Run
from mellum2_megatron.recipes.four_layers import FOUR_LAYERS, four_layer_pretraining
from mellum2_megatron.recipes.long_context import LONG_CONTEXT
from mellum2_megatron.recipes.own_file import RecipeFile, RecipeOrigin, as_variant, split_file
from mellum2_megatron.recipes.pretraining import PRETRAINING
from mellum2_megatron.recipes.rlvr import RLVR
from mellum2_megatron.recipes.sft import SFT
from mellum2_megatron.recipes.stage import StageFamily, stage_recipes
from mellum2_megatron.recipes.tiny import TINY, quickstart

MELLUM2_12B = StageFamily(
    name="mellum2_12b", title="Mellum 2 12B", stages=(*PRETRAINING, LONG_CONTEXT, *SFT, *RLVR)
)

# A table, not decorators: its content does not depend on which modules are imported.
_RECIPES: dict[str, Callable[..., Run]] = {
    **stage_recipes(MELLUM2_12B),
    **stage_recipes(FOUR_LAYERS),
    "mellum2_4layer_pretrain_1gpu_h200_fp8": four_layer_pretraining,
    **stage_recipes(TINY),
    "mellum2_tiny_pretrain": quickstart,
}


_OURS = frozenset(_RECIPES)


def register(function: Callable[..., Run]) -> Callable[..., Run]:
    """Add ``function`` to the recipes under its own name: a decorator for outside this package.

    A recipe of the same name is replaced. A variant of another recipe gets a name and a description
    of its own, see `as_variant`.
    """
    _RECIPES[function.__name__] = function
    return function


def recipe_names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted."""
    return tuple(sorted(_RECIPES))


def describe_recipes(file: Path | None = None) -> dict[str, str]:
    """Return every recipe's description (one line) by name.

    Args:
        file: Python file of recipes, in its own order; None (default): the named ones, sorted.

    Raises:
        InputError: the file or one of its recipes fails.
    """
    if file is None:
        return {name: recipe(name).description for name in recipe_names()}
    opened = RecipeFile.read(file)
    if not opened.functions:
        opened.function(None)  # refuses a file without recipes
    return {name: _own_recipe(opened, name).description for name in opened.functions}


def recipe(name: str, **choices: Any) -> Run:
    """Return the run of recipe ``name``.

    Args:
        name: one of `recipe_names`; or ``FILE.py:FUNCTION`` for a recipe in a file, ``FILE.py`` for
            the only one in it.
        **choices: keyword arguments of the function of a named recipe.

    Raises:
        InputError: an unknown recipe or choice (the message names the nearest), or a file that
            fails.
    """
    in_file = split_file(name)
    if in_file is not None and name not in _RECIPES:
        return _own_recipe(RecipeFile.read(in_file[0]), in_file[1])
    if name not in _RECIPES:
        raise InputError(f"recipe {name!r}", rule="there is no such recipe", fix=_meant(name))
    function = _RECIPES[name]
    known = inspect.signature(function).parameters
    for choice, value in choices.items():
        if choice not in known:
            raise InputError(
                f"{choice}={value!r}",
                rule=f"recipe {name} has no such choice",
                fix=nearest(choice, known) if known else "drop it",
            )
    run = function(**choices)
    if name in _OURS:
        return run
    return as_variant(run, name, function, {our: _RECIPES[our] for our in _OURS - {name}})


def _own_recipe(file: RecipeFile, name: str | None) -> Run:
    """Return the run of a recipe in a file; the source of its name is the file with its hash."""
    name, function = file.function(name)
    siblings = {
        other: functools.partial(file.call, other, make)
        for other, make in file.functions.items()
        if other != name
    }
    ours = {our: _RECIPES[our] for our in sorted(_OURS)}
    run = as_variant(file.call(name, function), name, function, ours, siblings)
    origin = RecipeOrigin(path=file.path.absolute(), function=name, sha256=file.sha256)
    return dataclasses.replace(run, sources={**run.sources, "name": str(origin)})


def _meant(name: str) -> str:
    """Return the fix for an unknown recipe: the way to give a path, else the nearest recipe."""
    if (Path(name) / RUN_FILE).is_file():
        return f"for that run, give its file: {Path(name) / RUN_FILE}"
    match kind_of(Path(name)):
        case "huggingface" | "checkpoint":
            return (
                "a model comes after a recipe: "
                f"RECIPE architecture={name} for its shape, checkpoint.load={name} for its weights"
            )
        case "data":
            return f"a corpus comes after a recipe: RECIPE data.path={name}"
    file, _, function = name.partition(":")
    if Path(f"{file}.py").is_file():
        return f"write {file}.py{':' * bool(function)}{function} for a recipe in that file"
    return nearest(name, _RECIPES)
