"""`mellum2 recipes`: names and descriptions of all recipes, or of those in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.common.console import console


def recipes(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE.py]", help="Python file of recipes; default: this project's"),
    ] = None,
) -> None:
    """List the recipes, one line each."""
    from rich.markup import escape
    from rich.padding import Padding

    from mellum2_megatron.recipes import describe_recipes

    described = describe_recipes(file)
    names = {name if file is None else f"{file}:{name}": line for name, line in described.items()}
    width = max(map(len, names))
    if console.is_terminal and width + max(map(len, names.values())) + 2 > console.width:
        for name, line in names.items():
            console.print(f"[bold]{escape(name)}[/]", soft_wrap=True)
            console.print(Padding(escape(line), (0, 0, 0, 4)))
        return
    # Unwrapped, so that `grep` finds a recipe's name and description on one line.
    for name, line in names.items():
        console.print(f"[bold]{escape(f'{name:<{width}}')}[/]  {escape(line)}", soft_wrap=True)
