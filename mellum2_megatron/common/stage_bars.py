"""Progress of work in stages on a terminal: a bar for each stage, one after the other."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from mellum2_megatron.common.console import error_console

if TYPE_CHECKING:
    from rich.progress import Progress

Advance = Callable[[int], None]
"""Adds finished units to the progress of a stage."""

StartStage = Callable[[str, int | None], Advance]
"""Begins a stage, given its name and its size in units, None if unknown."""


@contextlib.contextmanager
def stage_bars(
    show: bool, logger: logging.Logger, *, unit: Literal["bytes", "tasks"]
) -> Iterator[StartStage]:
    """Yield a function that begins a stage with a bar of its own; each stage is logged too.

    There are no bars if ``show`` is false or standard error is not a terminal.

    Args:
        show: wish for bars.
        logger: log of the stages.
        unit: unit of sizes.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    bars: Progress | None = None
    if show and error_console.is_terminal:
        bars = Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(),
            DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=error_console,
        )

    def start_stage(stage: str, total: int | None) -> Advance:
        size = "" if not total else f" ({total / 1e6:.1f} MB)" if unit == "bytes" else f" ({total})"
        logger.info("%s%s", stage, size)
        if bars is None:
            return lambda _: None
        _end_bars(bars)
        task = bars.add_task(stage, total=total)
        return lambda amount: bars.advance(task, amount)

    if bars is None:
        yield start_stage
        return
    with bars:
        yield start_stage
        _end_bars(bars)


def _end_bars(bars: Progress) -> None:
    """Fill every bar and stop its clock: a stage may end below its size, which can be a limit."""
    for task in bars.tasks:
        bars.update(task.id, total=task.completed)
        bars.stop_task(task.id)
