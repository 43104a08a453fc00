"""Completions of the shell: recipes, run files, presets, keys and their values.

The shell starts `mellum2` at each press of the key, so nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin


def complete_recipe(incomplete: str) -> Iterator[str]:
    """Yield recipes, run files and Python files of recipes that begin with a text."""
    from mellum2_megatron.recipes import recipe_names

    yield from (name for name in recipe_names() if name.startswith(incomplete))
    yield from _paths(incomplete, (".yaml", ".yml", ".py"))


def complete_subject(incomplete: str) -> Iterator[str]:
    """Yield recipes, run files and architecture presets that begin with a text."""
    from mellum2_megatron.architecture import PRESETS

    yield from complete_recipe(incomplete)
    yield from (name for name in PRESETS if name.startswith(incomplete))


def complete_keys(incomplete: str) -> Iterator[str]:
    """Yield the keys and sections of a run that begin with a text."""
    from mellum2_megatron.config import keys

    known = keys()
    sections = dict.fromkeys(key.partition(".")[0] for key in known if "." in key)
    yield from (name for name in (*sections, *known) if name.startswith(incomplete))


def complete_override(incomplete: str) -> Iterator[str]:
    """Yield ``key=`` for keys that begin with a text, and after the ``=`` the key's choices.

    A key of free text completes to paths.
    """
    from mellum2_megatron.config import keys
    from mellum2_megatron.config.key_reference import key_annotation

    key, equals, value = incomplete.partition("=")
    if not equals:
        yield from (f"{name}=" for name in keys() if name.startswith(incomplete))
        return
    if key not in keys():
        return
    annotation = key_annotation(key)
    choices: list[str] = []
    for option in get_args(annotation) if get_origin(annotation) is not None else (annotation,):
        if isinstance(option, str):
            choices.append(option)
        elif option is bool:
            choices += ["true", "false"]
        elif option is type(None):
            choices.append("null")
        elif option is str:
            choices += _paths(value, ("",))
    yield from (f"{key}={choice}" for choice in choices if choice.startswith(value))


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yield folders, and files that end in one of the suffixes, that begin with a text."""
    folder = incomplete.rpartition("/")[0]
    parent = Path(folder or ("/" if incomplete.startswith("/") else "."))
    if not parent.is_dir():
        return
    for child in sorted(parent.iterdir()):
        shown = f"{incomplete[: incomplete.rfind('/') + 1]}{child.name}"
        if not shown.startswith(incomplete) or child.name.startswith("."):
            continue
        if child.is_dir():
            yield f"{shown}/"
        elif child.name.endswith(suffixes):
            yield shown
