"""Pictures of runs, drawn from ``metrics.jsonl``: the loss curve of one, any metric of several."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.files import atomic_path
from mellum2_megatron.metrics.log import Kind, Record, read_metrics, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Against = Literal["step", "samples", "tokens"]

LOSS_CURVE = "loss.png"
"""File of a run's loss curve, in its folder."""

_INK, _MUTED, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_LM, _MTP, _VALID = "#2563eb", "#f59e0b", "#0f172a"
_RUNS = ("#2563eb", "#f59e0b", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#db2777", "#65a30d")
_WINDOWS = 50
"""A curve is smoothed over this part of its points: 1 / `_WINDOWS`."""

_UNITS = {
    "lm_loss": "cross entropy (nats per token)",
    "mtp_loss": "cross entropy (nats per token)",
    "step": "optimizer step",
}
"""Axis label of a name, where it differs from the name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """The metrics of one run, with the names that a picture shows.

    Attributes:
        name: name of the run, such as its folder.
        records: lines of its ``metrics.jsonl``.
        recipe: name of its recipe; empty (default): unknown.
    """

    name: str
    records: Sequence[Record]
    recipe: str = ""

    @property
    def label(self) -> str:
        """Name and recipe, for a legend."""
        return f"{self.name} ({self.recipe})" if self.recipe else self.name

    def metric_names(self, kind: Kind = "train") -> list[str]:
        """Return the names of all metrics of a kind, sorted."""
        return sorted(
            {name for record in self.records if record.kind == kind for name in record.values}
        )


def plot_loss(
    metrics: str | os.PathLike[str] | Sequence[Record],
    png_path: str | os.PathLike[str],
    *,
    unigram_entropy: float | None = None,
    ln_vocab: float | None = None,
    title: str = "Mellum 2 training loss",
    recipe: str = "",
) -> None:
    """Draw the training loss, the MTP loss and the validation loss over steps.

    Training losses are drawn twice: as logged, pale, and as a running mean.

    Args:
        metrics: ``metrics.jsonl`` of the run, or its records.
        png_path: picture to write.
        unigram_entropy: reference line: loss of the best guess without context, in nats a token;
            None (default): no line.
        ln_vocab: reference line: loss of a uniform guess, in nats a token; None (default): no line.
        title: title of the picture.
        recipe: recipe of the run, below the title; empty (default): none.

    Raises:
        InputError: the file is missing, damaged, or holds no training loss.
    """
    records = read_metrics(metrics) if isinstance(metrics, (str, os.PathLike)) else metrics
    steps, losses = series(records, "lm_loss")
    if not steps:
        raise InputError(
            title if records is metrics else str(metrics),
            rule="it holds no lm_loss",
            fix="name the metrics.jsonl of a training run that has logged a step",
        )
    figure, (axes,) = _figure(title, 1)
    # Drawn first, so that the main curve lies on top.
    mtp_steps, mtp_losses = series(records, "mtp_loss")
    if mtp_steps:
        _curve(axes, mtp_steps, mtp_losses, color=_MTP, label="MTP (token after next), training")
    _curve(axes, steps, losses, color=_LM, label="next token, training")
    valid_steps, valid_losses = series(records, "lm_loss", "valid")
    if valid_steps:
        _points(
            axes,
            valid_steps,
            valid_losses,
            color=_VALID,
            label=f"next token, validation (last {valid_losses[-1]:.2f})",
        )
    for value, label in (
        (ln_vocab, "uniform guess"),
        (unigram_entropy, "best without context (unigram entropy)"),
    ):
        if value is not None:
            _reference_line(axes, value, f"{label}: {value:.2f}")
    axes.set_xlabel(_UNITS["step"])
    axes.set_ylabel(_UNITS["lm_loss"])
    axes.set_xlim(0, max([*steps, *valid_steps]))
    _limits(axes, [*losses, *mtp_losses, *valid_losses], [unigram_entropy, ln_vocab])
    _token_axis(axes, records)
    _notes(figure, axes, recipe, len(steps))
    _save(figure, png_path)


def plot_runs(
    runs: Sequence[Curves],
    png_path: str | os.PathLike[str],
    *,
    metrics: Sequence[str] = ("lm_loss",),
    against: Against = "step",
    title: str = "",
) -> None:
    """Draw metrics of several runs in one picture, a panel for each metric.

    Validations of a metric are drawn as points in the colour of their run.

    Args:
        runs: the runs, one or more.
        png_path: picture to write.
        metrics: names in ``metrics.jsonl``, default the loss.
        against: horizontal axis, default steps. Runs with other batches or sequence lengths are
            better compared over samples or tokens.
        title: title of the picture; empty (default): names of the runs.

    Raises:
        InputError: no run has a metric, or a run has not logged samples or tokens.
    """
    heading = title or (runs[0].label if len(runs) == 1 else f"{len(runs)} runs")
    figure, panels = _figure(heading, len(metrics))
    points = 0
    for metric, axes in zip(metrics, panels, strict=True):
        shown: list[float] = []
        for number, run in enumerate(runs):
            color = _RUNS[number % len(_RUNS)]
            steps, values = series(run.records, metric)
            valid_steps, valid = series(run.records, metric, "valid")
            if steps:
                _curve(axes, _positions(run, steps, against), values, color=color, label=run.label)
            if valid_steps:
                label = f"{run.name}, validation (last {valid[-1]:.4g})"
                places = _positions(run, valid_steps, against)
                _points(axes, places, valid, color=color, label=label)
            shown += [*values, *valid]
            points = max(points, len(steps))
        if not shown:
            names = sorted({name for run in runs for name in run.metric_names()})
            raise InputError(
                f"--metric {metric}",
                rule="no such number in " + ", ".join(run.name for run in runs),
                fix=f"{nearest(metric, names)}; there are {', '.join(names)}",
            )
        axes.set_ylabel(_UNITS.get(metric, metric))
        _limits(axes, shown, [], positive=min(map(_or_zero, shown)) >= 0)
    panels[-1].set_xlabel(_UNITS.get(against, against))
    if against != "step":
        panels[-1].xaxis.set_major_formatter(_short)
    _notes(figure, panels[0], "", points)
    _save(figure, png_path)


def smoothed(values: Sequence[float]) -> tuple[list[float], int]:
    """Return a centred running mean of ``values``, and the number of points that it covers.

    The window is a fiftieth of the points, an odd number, and shrinks at both ends. Values that are
    not finite are left out of the mean; where nothing else is in the window, the mean is NaN.

    >>> smoothed([1.0, 2.0, 3.0])
    ([1.0, 2.0, 3.0], 1)
    """
    half = len(values) // _WINDOWS // 2 + (len(values) >= _WINDOWS)
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(array))
    # A window that shrinks on both sides alike keeps a slope at the ends where it is.
    reach = np.minimum(half, np.minimum(index, len(array) - 1 - index))
    low, high = index - reach, index + reach + 1
    number = counts[high] - counts[low]
    means = np.divide(
        sums[high] - sums[low], number, out=np.full(len(array), math.nan), where=number > 0
    )
    return means.tolist(), 2 * half + 1


def _figure(title: str, panels: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps global state and may pick an interactive backend.
    figure = Figure(figsize=(9, 2.4 + 2.8 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=_INK)
    every = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for axes in every:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_MUTED)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_MUTED, length=0)
        axes.xaxis.label.set_color(_MUTED)
        axes.yaxis.label.set_color(_MUTED)
    return figure, every


def _curve(
    axes: Axes, positions: Sequence[float], values: Sequence[float], *, color: str, label: str
) -> None:
    """Draw a metric as logged, pale, and smoothed on top; few points are drawn once."""
    means, window = smoothed(values)
    if window > 1:
        axes.plot(positions, values, color=color, linewidth=0.8, alpha=0.25, label="_as logged")
    axes.plot(positions, means if window > 1 else values, color=color, linewidth=1.7, label=label)


def _points(
    axes: Axes, positions: Sequence[float], values: Sequence[float], *, color: str, label: str
) -> None:
    """Draw validations: points, not a line, because they are rare; unclipped at the right edge."""
    axes.plot(
        positions,
        values,
        color=color,
        linewidth=0,
        marker="o",
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=1.2,
        label=label,
        zorder=5,
        clip_on=False,
    )


def _reference_line(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=_MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.annotate(
        label,
        (1.0, value),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(0, 4),
        ha="right",
        fontsize=9,
        color=_MUTED,
    )


def _limits(
    axes: Axes, values: list[float], references: list[float | None], *, positive: bool = True
) -> None:
    # A diverged run logs nan and inf, for which matplotlib would raise.
    shown = [
        value for value in [*values, *references] if value is not None and math.isfinite(value)
    ]
    if not shown:
        return
    low, high = min(shown), max(shown)
    margin = 0.08 * (high - low or abs(high) or 1.0)
    axes.set_ylim(max(0.0, low - 1.6 * margin) if positive else low - margin, high + margin)


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _positions(run: Curves, steps: Sequence[int], against: Against) -> list[float]:
    """Return the place of each step on the horizontal axis."""
    if against == "step":
        return [float(step) for step in steps]
    known_steps, known = series(run.records, against)
    if not known_steps:
        raise InputError(
            f"--against {against}", rule=f"{run.name} has not logged it", fix="use --against step"
        )
    # The batch may grow, so samples and tokens are interpolated, not scaled.
    return np.interp(steps, [0, *known_steps], [0.0, *known]).tolist()


def _token_axis(axes: Axes, records: Sequence[Record]) -> None:
    """Add an axis of tokens along the top, if the records have them."""
    steps, tokens = series(records, "tokens")
    if len(steps) < 2 or tokens[-1] <= 0:
        return

    # The batch may grow, so tokens are interpolated, not scaled. Past the end the average
    # continues, for an axis that reaches further than the last step.
    known_steps, known_tokens = [0, *steps, 2 * steps[-1]], [0.0, *tokens, 2 * tokens[-1]]

    def to_tokens(step: Any) -> Any:
        return np.interp(step, known_steps, known_tokens)

    def to_steps(count: Any) -> Any:
        return np.interp(count, known_tokens, known_steps)

    # matplotlib places the ticks of a secondary axis by the inverse function.
    top = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
    top.set_xlabel("tokens", color=_MUTED)
    top.tick_params(colors=_MUTED, length=0)
    top.spines["top"].set_visible(False)
    top.xaxis.set_major_formatter(_short)


def _notes(figure: Figure, axes: Axes, recipe: str, points: int) -> None:
    """Add recipe and smoothing above the first panel, and the legend below all."""
    parts = [f"recipe {recipe}"] if recipe else []
    if smoothed([0.0] * points)[1] > 1:
        parts.append("dark: running mean of 2% of the points; pale: as logged")
    if parts:
        axes.set_title("; ".join(parts), loc="left", fontsize=9, color=_MUTED)
    handles, labels = [], []
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(
        handles,
        labels,
        frameon=False,
        loc="outside lower center",
        ncols=3 if max(map(len, labels)) < 45 else 1,
        labelcolor=_INK,
    )


def _short(value: float, _: Any) -> str:
    from mellum2_megatron.metrics.console import short_number

    return short_number(value)


def _save(figure: Figure, png_path: str | os.PathLike[str]) -> None:
    path = Path(png_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
