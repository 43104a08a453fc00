"""`mellum2 plot`: pictures of what runs have logged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.common.console import print_line
from mellum2_megatron.common.errors import InputError

DEFAULT_METRIC = "lm_loss"


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="run folders, or metrics.jsonl files")
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="draw all runs into one picture")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="PNG file to write; default: loss.png in the run's folder, or compare.png"
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="name in metrics.jsonl, such as grad_norm (repeatable: a panel each); "
            "default: the losses",
        ),
    ] = None,
    against: Annotated[
        str, typer.Option("--against", help="horizontal axis: step, samples or tokens")
    ] = "step",
) -> None:
    """Draw the loss curve of each run, or compare several runs in one picture.

    Curves are smoothed; the logged points are drawn pale. Validations are points.
    """
    from typing import get_args

    from mellum2_megatron.checkpoint.run_list import read_curves
    from mellum2_megatron.metrics import plot_loss
    from mellum2_megatron.metrics.plots import LOSS_CURVE, Against, plot_runs

    if against not in get_args(Against):
        raise InputError(
            f"--against {against}", rule="no such axis", fix="use step, samples or tokens"
        )
    if out is not None and out.suffix.lower() != ".png":
        raise InputError(f"--out {out}", rule="the picture is a PNG file", fix="end it in .png")
    if out is not None and len(runs) > 1 and not compare:
        raise InputError(
            f"--out {out}",
            rule=f"{len(runs)} runs make {len(runs)} pictures",
            fix="add --compare to draw them into one, or name one run",
        )
    # Every run is read before the first picture is written.
    curves = [read_curves(path) for path in runs]
    if compare:
        names = [run.name for run in curves]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(twice, rule="it is named twice", fix="name each run once")
        file = out or Path("compare.png")
        plot_runs(curves, file, metrics=metric or (DEFAULT_METRIC,), against=against)  # type: ignore[arg-type]  # checked
        print_line(f"wrote {file}")
        return
    for path, run in zip(runs, curves, strict=True):
        folder = path if path.is_dir() else path.parent
        file = out or folder / (
            "-".join(metric).replace("/", "_") + ".png" if metric else LOSS_CURVE
        )
        if metric or against != "step":
            plot_runs([run], file, metrics=metric or (DEFAULT_METRIC,), against=against)  # type: ignore[arg-type]  # checked
        else:
            plot_loss(run.records, file, title=run.name, recipe=run.recipe)
        print_line(f"wrote {file}")
