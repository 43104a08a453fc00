"""Output for people: two consoles, unwrapped lines, tables without frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from rich.table import Column, Table

# rich looks up sys.stdout and sys.stderr at each print, so redirected streams are followed.
# highlight=False: it would colour the parts of a number or a path one by one.
console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


def print_line(text: str) -> None:
    """Print ``text`` as it is, without wrapping, markup, emoji or colours.

    A path or value is then never broken over two lines, so ``grep`` finds it.
    """
    console.print(text, soft_wrap=True, markup=False, emoji=False, highlight=False)


def plain_table(*columns: Column | str, title: str | None = None, **options: Any) -> Table:
    """Return an empty table without frame, two spaces between its columns.

    Args:
        columns: headers, or rich columns where a header needs alignment or folding.
        title: bold line above the table.
        options: further arguments of ``rich.table.Table``.
    """
    from rich.table import Table  # takes 7 ms; most commands and ranks print no table

    return Table(
        *columns,
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        **options,
    )
