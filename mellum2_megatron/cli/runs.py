"""`mellum2 runs`: runs on disk, with progress and state."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mellum2_megatron.cli.options import AsJson
from mellum2_megatron.common.console import print_line

if TYPE_CHECKING:
    from mellum2_megatron.checkpoint.run_list import RunOnDisk


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="folder that is searched for runs")
    ] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder: recipe, state, progress and last loss.

    States: finished, stopped (saved on request), failed, running, new (never started).
    The run that changed last is at the end.
    """
    from mellum2_megatron.checkpoint.run_list import runs_in

    found = runs_in(folder)
    if as_json:
        sys.stdout.write(json.dumps([run.to_json() for run in found], indent=2) + "\n")
    elif not found:
        print_line(f"no runs in {folder}")
    else:
        for run in found:
            _print(run)


def _print(run: RunOnDisk) -> None:
    """Print a run in two lines, each narrower than 80 columns but for a long path."""
    from mellum2_megatron.metrics.console import short_number

    print_line(f"{run.folder}  {run.recipe}")
    date = datetime.fromtimestamp(run.changed).strftime("%Y-%m-%d %H:%M")
    parts = [f"{run.state:<8}"]
    if run.steps:
        parts.append(f"step {run.step}/{run.steps}")
    if run.samples is not None:
        parts.append(f"{short_number(run.samples)} samples")
    if run.loss is not None:
        parts.append(f"loss {run.loss:.3f}")
    print_line("  " + "  ".join([*parts, date]))
    if run.problem:
        print_line(f"  {run.problem}")
