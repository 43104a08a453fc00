"""Recipes in a file of the user's own: ``my_recipes.py``, or ``my_recipes.py:my_window``.

A recipe is a public function of the file that needs no argument and returns a `Run`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.own_python import errors_of_file, execute_file
from mellum2_megatron.config import Run, keys

_KIND = "a file of recipes"
_WRITE_ONE = "write a function without arguments that returns a Run (docs/bring_your_own.md)"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFile:
    """A Python file with recipes, already executed.

    Attributes:
        path: the file, as the user wrote it.
        sha256: hash of its content, hexadecimal.
        functions: its recipes by name, in the file's order.
        module: the executed file.
    """

    path: Path
    sha256: str
    functions: Mapping[str, Callable[..., Any]]
    module: ModuleType

    @classmethod
    def read(cls, path: Path) -> RecipeFile:
        """Execute a file and find its recipes. Modules beside it can be imported by it.

        Raises:
            InputError: there is no such file, or it fails; the message has the failing line.
        """
        module, content = execute_file(path, _KIND)
        functions = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and _is_recipe(value, module)
        }
        return cls(
            path=path,
            sha256=hashlib.sha256(content).hexdigest(),
            functions=functions,
            module=module,
        )

    def function(self, name: str | None) -> tuple[str, Callable[..., Any]]:
        """Return a recipe's name and function; without a name the only recipe.

        Raises:
            InputError: no such function, or no name and not exactly one recipe.
        """
        if name is None:
            if len(self.functions) == 1:
                return next(iter(self.functions.items()))
            if not self.functions:
                raise InputError(str(self.path), rule="it has no recipe", fix=_WRITE_ONE)
            raise InputError(
                str(self.path),
                rule=f"it has {len(self.functions)} recipes",
                fix=f"name one: {', '.join(f'{self.path}:{one}' for one in self.functions)}",
            )
        value = getattr(self.module, name, None)
        if value is None:
            raise InputError(
                f"{self.path}:{name}",
                rule=f"{self.path} has no recipe {name!r}",
                fix=nearest(name, self.functions) if self.functions else _WRITE_ONE,
            )
        if not callable(value):
            raise InputError(
                f"{self.path}:{name}",
                rule=f"a recipe is a function, this is a value of type {type(value).__name__}",
                fix="write a function that returns it",
            )
        needed = _required_arguments(value)
        if needed:
            raise InputError(
                f"{self.path}:{name}",
                rule=f"it needs arguments ({', '.join(needed)}), which no command gives",
                fix="give each a default",
            )
        return name, value

    def call(self, name: str, function: Callable[..., Any]) -> Run:
        """Return the run of a recipe, as its function returns it.

        Raises:
            InputError: the function fails, or returns something else.
        """
        with errors_of_file(self.path, _KIND):
            run = function()
        if not isinstance(run, Run):
            raise InputError(
                f"{self.path}:{name}",
                rule=f"it returns {type(run).__name__}, a recipe returns a Run",
                fix="return a mellum2_megatron.config.Run"
                if run is not None
                else "end the function with `return`",
            )
        return run


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeOrigin:
    """Place of a run's recipe in a file of the user's own; the source of the run's name.

    Attributes:
        path: the file, absolute.
        function: name of the recipe in it.
        sha256: hash of the file's content, hexadecimal.
    """

    path: Path
    function: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.path}:{self.function}, sha256 {self.sha256}"


def recipe_origin(run: Run) -> RecipeOrigin | None:
    """Return the file that the run's recipe is in; None for a recipe without a file of its own."""
    match = re.fullmatch(
        r"(?P<path>.*):(?P<function>\w+), sha256 (?P<sha256>[0-9a-f]{64})",
        run.sources.get("name", ""),
        re.DOTALL,
    )
    if match is None:
        return None
    return RecipeOrigin(
        path=Path(match["path"]), function=match["function"], sha256=match["sha256"]
    )


def split_file(word: str) -> tuple[Path, str | None] | None:
    """Return file and function of ``FILE.py`` or ``FILE.py:FUNCTION``; None for any other word."""
    match = re.fullmatch(r"(.*\.py)(?::(\w*))?", word, re.DOTALL)
    return None if match is None else (Path(match[1]).expanduser(), match[2] or None)


def as_variant(
    run: Run,
    name: str,
    function: Callable[..., Any],
    ours: Mapping[str, Callable[[], Run]],
    siblings: Mapping[str, Callable[[], Run]] | None = None,
) -> Run:
    """Return a recipe's run with a name and a description of its own, and honest sources.

    `dataclasses.replace` keeps the parent's. A name that belongs to a parent becomes ``name``, and
    its description the first line of the function's docstring, else "Variant of PARENT". A value
    that differs from the parent's loses the parent's source.

    Args:
        run: the run that the function returned.
        name: name of the recipe.
        function: function of the recipe.
        ours: this project's recipes by name, possible parents.
        siblings: the other recipes of the user's file by name; default none.
    """
    documented = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ").strip()
    parents = {**ours, **(siblings or {})}
    described: str | None = run.name if run.name in parents and run.name != name else None
    # A name of its own with a parent's text. Siblings are not called for it: one may be broken.
    if described is None and run.description:
        described = next(
            (other for other, make in ours.items() if make().description == run.description), None
        )
    if described is None:
        return dataclasses.replace(run, description=run.description or documented)
    parent = parents[described]()
    sources = dict(run.sources)
    for key in keys():
        if (
            key not in ("name", "description")
            and _value(run, key) != _value(parent, key)
            and run.source(key) == parent.source(key)
        ):
            sources[key] = f"recipe {name}"
    return dataclasses.replace(
        run,
        name=name if run.name == described else run.name,
        description=(documented or f"Variant of {described}.")
        if run.description in ("", parent.description)
        else run.description,
        sources=sources,
    )


def _value(run: Run, key: str) -> Any:
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _is_recipe(value: Any, module: ModuleType) -> bool:
    """Return true for a function of the file that may be a recipe."""
    if not inspect.isfunction(value) or value.__module__ != module.__name__:
        return False
    returns = value.__annotations__.get("return", Run)
    # Under `from __future__ import annotations` an annotation is text.
    is_run = returns is Run or (
        isinstance(returns, str) and returns.strip("'\"").endswith(Run.__name__)
    )
    return is_run and not _required_arguments(value)


def _required_arguments(function: Callable[..., Any]) -> list[str]:
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
