"""`mellum2 keys`: type, default and meaning of every key of a run."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from mellum2_megatron.cli.complete import complete_keys
from mellum2_megatron.common.console import console, print_line


def keys(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="SECTION|KEY",
            help="section such as layout, or key such as layout.ep; default: all",
            autocompletion=complete_keys,
        ),
    ] = None,
) -> None:
    """Explain the keys of a run, those that KEY=VALUE overrides set.

    Each has its values, its default and its meaning; `docs/keys.md` is the same list.
    """
    from mellum2_megatron.config.key_reference import find_entries, key_entries

    width = min(console.width, 100) - 4
    for entry in key_entries() if name is None else find_entries(name):
        default = "" if entry.default is None else f"={entry.default}"
        print_line(f"{entry.key}{default}")
        for text in (f"({entry.type})", entry.meaning.replace("``", "`")):
            for line in textwrap.wrap(text, width):
                print_line(f"    {line}")
