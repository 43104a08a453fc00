"""Pictures of a report: differences with their intervals, and loss curves with bands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablations.answering.comparison import Comparison
from ablations.answering.run_measures import RunMeasures
from mellum2_megatron.common.files import atomic_path
from mellum2_megatron.metrics.console import short_number
from mellum2_megatron.metrics.plots import smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_ARMS = ("#2563eb", "#f59e0b", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#db2777", "#65a30d")
_POINTS = 400
"""Places of a curve at which the runs of an arm are averaged."""


def draw_forest(comparison: Comparison, png: Path) -> None:
    """Draw the difference of each arm by the deciding metric: both intervals, and delta."""
    metric = comparison.study.metrics[0]
    answers = comparison.answers[metric.name]
    figure, (axes,) = _figure(1, height=1.6 + 0.5 * len(answers))
    figure.suptitle(
        f"{comparison.name}: {metric.name}, arm less {comparison.study.control}",
        x=0.01,
        ha="left",
        color=_INK,
    )
    axes.axvspan(-metric.delta, metric.delta, color=_GRID, label=f"delta {metric.delta:g}")
    axes.axvline(0, color=_MUTED, linewidth=1)
    for row, one in enumerate(answers):
        for interval, width, label in (
            (one.plan_interval, 1.2, "interval of the plan"),
            (one.interval, 4.0, "95% t interval"),
        ):
            if interval is not None:
                axes.plot(
                    [interval.low, interval.high],
                    [row, row],
                    color=_ARMS[0],
                    linewidth=width,
                    solid_capstyle="butt",
                    label=label,
                )
        if np.isfinite(one.difference):
            axes.plot([one.difference], [row], "o", color=_INK, markersize=5, zorder=3)
    axes.set_yticks(
        range(len(answers)), [f"{one.arm}\n{one.word}, n={len(one.seeds)}" for one in answers]
    )
    axes.set_ylim(len(answers) - 0.5, -0.5)
    side = "left" if metric.better == "lower" else "right"
    axes.set_xlabel(f"difference ({side} is better)", color=_MUTED)
    _legend(figure, axes)
    _save(figure, png)


def draw_curves(comparison: Comparison, png: Path) -> None:
    """Draw the losses of each arm over tokens and over FLOPs: mean, and the range of the seeds."""
    figure, panels = _figure(2, height=6.4)
    title = f"{comparison.name}: training loss, mean and range of the seeds; dots: validations"
    figure.suptitle(title, x=0.01, ha="left", color=_INK)
    for number, arm in enumerate(comparison.study.arms):
        runs = comparison.of_arm(arm.name)
        for axes, flops in zip(panels, (False, True), strict=True):
            _draw_arm(axes, runs, arm.name, _ARMS[number % len(_ARMS)], flops=flops)
    shown = np.concatenate([_late(run) for run in comparison.runs] or [np.zeros(0)])
    for axes, label in zip(panels, ("tokens", "FLOPs"), strict=True):
        axes.set_xlabel(label, color=_MUTED)
        axes.set_ylabel("nats per token", color=_MUTED)
        axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
        if shown.size:
            # The first steps fall so far that arms would lie on one another.
            margin = 0.1 * float(np.ptp(shown)) or 0.1
            axes.set_ylim(float(shown.min()) - margin, float(shown.max()) + margin)
    _legend(figure, panels[0])
    _save(figure, png)


def _late(run: RunMeasures) -> Any:
    """Return the finite losses after the first fifth of a run."""
    late: list[float] = []
    for valid in (False, True):
        tokens, values = run.curve("lm_loss", valid=valid)
        kept = [
            value for place, value in zip(tokens, values, strict=True) if place > tokens[-1] / 5
        ]
        late += [value for value in kept if np.isfinite(value)]
    return np.array(late)


def _draw_arm(
    axes: Axes, runs: Sequence[RunMeasures], label: str, color: str, *, flops: bool
) -> None:
    curves = []
    for run in runs:
        tokens, values = run.curve("lm_loss")
        scale = run.flops_per_token if flops else 1.0
        if len(tokens) > 1:
            curves.append((np.array(tokens) * scale, np.array(smoothed(values)[0])))
        places, losses = run.curve("lm_loss", valid=True)
        axes.plot(
            np.array(places) * scale, losses, "o", color=color, markersize=4, label="_validation"
        )
    if not curves:
        return
    grid = np.linspace(
        max(curve[0][0] for curve in curves), min(curve[0][-1] for curve in curves), _POINTS
    )
    table = np.array([np.interp(grid, places, values) for places, values in curves])
    axes.fill_between(grid, table.min(0), table.max(0), color=color, alpha=0.15, linewidth=0)
    axes.plot(grid, table.mean(0), color=color, linewidth=1.5, label=f"{label} (n={len(curves)})")


def _figure(panels: int, *, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps global state and may pick an interactive backend.
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    every = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    for axes in every:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x" if panels == 1 else "y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_MUTED, length=0)
    return figure, every


def _legend(figure: Figure, axes: Axes) -> None:
    labelled = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if labelled:
        figure.legend(
            labelled.values(),
            labelled.keys(),
            frameon=False,
            loc="outside lower center",
            ncols=3,
            labelcolor=_INK,
        )


def _save(figure: Figure, png: Path) -> None:
    with atomic_path(png) as temporary:
        # Without the version of matplotlib, so that the same runs give the same bytes.
        figure.savefig(temporary, format="png", dpi=140, metadata={"Software": None})
