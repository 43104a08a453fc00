"""`mellum2 recipes`: names and descriptions of all recipes."""

from __future__ import annotations

from mellum2_megatron.common.console import console


def recipes() -> None:
    """List the recipes, one line each."""
    from mellum2_megatron.recipes import describe_recipes

    described = describe_recipes()
    width = max(map(len, described))
    # Unwrapped, so that `grep` finds a recipe's name and description on one line.
    for name, line in described.items():
        console.print(f"[bold]{name:<{width}}[/]  {line}", soft_wrap=True, highlight=False)
