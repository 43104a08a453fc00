"""Picture of `mellum2 search`: latency over depth and width, with lines of equal latency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import atomic_path
from mellum2_megatron.planning.shape_search import MODES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _MUTED = "#1f2430", "#6b7280"
_BASE, _DENSE = "#dc2626", "#0f172a"
_TITLES = {
    "sync": "synchronous: milliseconds of one request alone",
    "throughput": "throughput: machine milliseconds of one request among many",
}


def draw_map(report: Mapping[str, Any], png: Path, *, base: str) -> None:
    """Draw both modes side by side.

    Colour and thin lines are latency. The thick line goes through all shapes as fast as the base,
    the dashed one through those as fast as Qwen2.5-7B's shape. The star is the base. Shapes that do
    not fit the GPU are white.

    Args:
        report: result of `planning.shape_search.search_shapes`.
        png: picture to write.
        base: name of the base in the legend.

    Raises:
        InputError: the map has fewer than two depths or widths.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    layers = sorted({row["layers"] for row in report["grid"]})
    hidden = sorted({row["hidden"] for row in report["grid"]})
    if len(layers) < 2 or len(hidden) < 2:
        raise InputError(
            f"--layers with {len(layers)} and --hidden with {len(hidden)} values",
            rule="a map needs two values or more of each",
            fix="give a range such as 16:48:4",
        )
    # No pyplot: it keeps global state and may pick an interactive backend.
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    workload = report["workload"]
    figure.suptitle(
        f"Analytic latency on {report['gpu']['label']}, {workload['prompt']:,} tokens in, "
        f"{workload['output']:,} out",
        x=0.01,
        ha="left",
        fontsize=14,
        fontweight="bold",
        color=_INK,
    )
    panels = figure.subplots(1, 2)
    for mode, axes in zip(MODES, panels, strict=True):
        values = np.full((len(hidden), len(layers)), np.nan)
        for row in report["grid"]:
            if row["fits"]:
                milliseconds = 1e3 * row[mode]
                values[hidden.index(row["hidden"]), layers.index(row["layers"])] = milliseconds
        _panel(axes, layers, hidden, values, report, mode)
    entries = [
        Line2D([], [], color=_BASE, linewidth=2.4, label=f"as fast as {base}"),
        Line2D([], [], color=_DENSE, linestyle="--", label="as fast as Qwen2.5-7B"),
        Line2D([], [], color=_BASE, marker="*", markersize=14, linewidth=0, label=base),
    ]
    figure.legend(
        handles=entries, frameon=False, loc="outside lower center", ncols=3, labelcolor=_INK
    )
    png.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(png) as temporary:
        # Without the version of matplotlib, so that the same report gives the same bytes.
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})


def _panel(
    axes: Axes,
    layers: list[int],
    hidden: list[int],
    values: np.ndarray,
    report: Mapping[str, Any],
    mode: str,
) -> None:
    from matplotlib.colors import LogNorm

    axes.set_title(_TITLES[mode], loc="left", fontsize=10, color=_MUTED)
    axes.set_xlabel("layers")
    axes.set_ylabel("hidden size")
    axes.set_xticks(layers)
    axes.set_yticks(hidden)
    axes.tick_params(colors=_MUTED, length=0)
    mesh = axes.pcolormesh(layers, hidden, values, cmap="YlGnBu", shading="nearest", norm=LogNorm())
    bar = axes.figure.colorbar(mesh, ax=axes, label="ms", shrink=0.85)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_formatter("{x:g}")
    if np.isfinite(values).sum() > 3:
        levels = np.geomspace(np.nanmin(values), np.nanmax(values), 10)[1:-1]
        thin = axes.contour(layers, hidden, values, levels=levels, colors=_MUTED, linewidths=0.6)
        axes.clabel(thin, fontsize=7, fmt="%.3g")
        for name, color, style, width in (
            ("base", _BASE, "-", 2.4),
            ("dense", _DENSE, "--", 1.6),
        ):
            level = 1e3 * report[name][mode] if report[name]["fits"] else np.nan
            # matplotlib warns of a level outside the values.
            if np.nanmin(values) < level < np.nanmax(values):
                axes.contour(
                    layers,
                    hidden,
                    values,
                    levels=[level],
                    colors=color,
                    linestyles=style,
                    linewidths=width,
                )
    axes.plot(report["base"]["layers"], report["base"]["hidden"], "*", color=_BASE, markersize=14)
