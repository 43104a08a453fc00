"""`mellum2 data index`: the sample indices of a run, built before it starts."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from mellum2_megatron.cli.options import Overrides, RecipeOrRun
from mellum2_megatron.common.console import print_line
from mellum2_megatron.common.files import size_text

if TYPE_CHECKING:
    from mellum2_megatron.data.feed.index_plan import SampleIndex


def index(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="processes; default: one per core")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            min=0.001,
            metavar="GB",
            help="memory of all processes together; default: 80% of what is free",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the indices and their sizes, and stop")
    ] = False,
) -> None:
    """Build the sample indices of a run over Megatron's format before it starts.

    Give the words of `mellum2 train` or `launch`: the start then finds all and builds none.
    Run again it goes on, and checks the hashes of what is there. Packs need no index.
    """
    from mellum2_megatron.planning.resolve import resolve_run
    from mellum2_megatron.training.index_builder import build_indices, plan_indices

    run = resolve_run(recipe, overrides or [])
    plan = plan_indices(run, memory=None if memory is None else int(memory * 1e9))
    workers = workers or len(os.sched_getaffinity(0))
    missing, total = (
        size_text(sum(each.size for each in part)) for part in (plan.missing, plan.indices)
    )
    count = len(plan.indices)
    print_line(
        f"{len(plan.missing)} of {count} indices to build, {missing}; up to {workers} processes "
        f"and {size_text(plan.memory)} of memory"
    )
    if dry_run:
        for each in plan.indices:
            state = "missing" if each in plan.missing else "complete"
            print_line(f"{_line(each)}; {state}; {size_text(each.memory)} of memory to build")
        return
    start = time.monotonic()
    for number, built in enumerate(build_indices(plan, workers=workers), start=1):
        print_line(
            f"[{number}/{count}] {_line(built.index)}; {_STATES[built.state]}; "
            f"{built.seconds:,.1f} s"
        )
    print_line(
        f"all {count} indices are complete, {total}, after {time.monotonic() - start:,.0f} s"
    )


_STATES = {
    "built": "built",
    "found": "found, hashes as written",
    "recorded": "found, hashes written down",
    "mended": "damaged, built anew",
}


def _line(index: SampleIndex) -> str:
    """Return split, source, entries and bytes of an index."""
    documents, samples = index.entries
    parts = ", ".join(
        f"{kind.partition('_')[0]} {size_text(size)}" for kind, size in index.sizes.items()
    )
    return (
        f"{index.split} {index.source.name}: {documents:,} documents, {samples:,} samples, "
        f"{size_text(index.size)} ({parts})"
    )
