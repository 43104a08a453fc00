"""Picture of a comparison of inference speeds: a panel for each figure, a bar for each arm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mellum2_megatron.common.files import atomic_path

_BARS, _INK, _MUTED = "#2563eb", "#1f2430", "#6b7280"


def draw_bench(report: Mapping[str, Any], png: Path) -> None:
    """Draw the figures of `inference.bench_report` with their 95% intervals.

    Args:
        report: the results.
        png: picture to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = report["arms"]
    names = list(dict.fromkeys(f["name"] for arm in arms.values() for f in arm["figures"]))
    # No pyplot: it keeps global state and may pick an interactive backend.
    figure = Figure(figsize=(2.6 * len(names), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    bench = report["bench"]
    title = f"{bench['mode']}: {bench['prompt']:,} tokens in, {bench['output']:,} out, "
    figure.suptitle(
        "\n".join([f"{title}{report['engine']} on {report['device']}", *report["notes"]]),
        x=0.01,
        ha="left",
        fontsize=10,
        color=_INK,
    )
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        found = {
            arm: next((f for f in entry["figures"] if f["name"] == name), None)
            for arm, entry in arms.items()
        }
        shown = {arm: one for arm, one in found.items() if one is not None}
        for arm, one in shown.items():
            low, high = one["low"], one["high"]
            reach = None if low is None else [[one["value"] - low], [high - one["value"]]]
            axes.bar(arm, one["value"], yerr=reach, color=_BARS, width=0.6, capsize=4)
        axes.set_title(f"{name}, {one_unit(shown)}", fontsize=9, color=_MUTED, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_MUTED, length=0, labelsize=8)
    png.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(png) as temporary:
        figure.savefig(temporary, format="png", dpi=140, metadata={"Software": None})


def one_unit(shown: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the unit of a figure, which all arms share."""
    return str(next(iter(shown.values()))["unit"])
