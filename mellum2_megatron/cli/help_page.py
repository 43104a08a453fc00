"""Help pages: texts with square brackets as they are, and option names that are never cut."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_HELP_WIDTH = 36
"""Columns that a help text needs beside the names; with fewer it stands below its option."""
_INDENT = 6


class OptionTable(Table):
    """Table of options that puts each help text below its option where there is no room beside."""

    def __init__(self, *headers: Any, **settings: Any) -> None:
        super().__init__(*headers, **settings)
        self._cells: list[tuple[Any, ...]] = []

    def add_row(self, *cells: Any, **settings: Any) -> None:
        """Add a row: mark of required options, names in four columns, type, and help text."""
        super().add_row(*cells, **settings)
        self._cells.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, or a list of options with their texts in a narrow terminal."""
        names = zip(*(cells[:-1] for cells in self._cells), strict=True)
        widths = [max(Text.from_markup(str(cell)).cell_len for cell in column) for column in names]
        if sum(width + 1 for width in widths) + _HELP_WIDTH <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        for *head, text in self._cells:
            yield Text(" ").join(Text.assemble(cell) for cell in head if str(cell))
            yield Padding(text, (0, 0, 0, _INDENT))


def mend_help(command: Any) -> None:
    """Mend the help pages of a command and of all commands below it.

    rich, which prints them, would read ``[b, s]`` as markup and drop it.
    """
    waiting: list[Any] = [command]
    while waiting:
        current = waiting.pop()
        waiting += getattr(current, "commands", {}).values()
        for documented in (current, *current.params):
            if getattr(documented, "help", None):
                documented.help = escape(documented.help)
        current.format_help = functools.partial(_print_help, current)


def _print_help(command: Any, context: Any, formatter: Any) -> None:
    """Print a help page with option names in full.

    typer/rich_utils.py:441 (0.29.2), `_print_options_panel`, adds rows to a table without columns
    of its own. rich then narrows the widest columns alike, and of `--max-document-megabytes` a
    terminal of 80 columns shows `--max-document-…`, which nobody can type.
    """
    from typer import rich_utils  # here: it takes a tenth of a second, and other commands none

    vars(rich_utils)["Table"] = OptionTable
    type(command).format_help(command, context, formatter)
