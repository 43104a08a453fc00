"""Tables and a bar chart of `train_step.py`'s results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.train_step_profile import PARTS
from mellum2_megatron.common.files import atomic_path, size_text

SMALL_NOTE = (
    "Small mode: a tiny model on a CPU, to show that the benchmark runs. "
    "Its figures mean nothing about speed on GPUs."
)
REFERENCE = {
    "name": "Moonlight-16B-A3B in Megatron-Bridge, BF16, natural routing, per H100 of 16",
    "model_flops_per_second": 387e12,
}
"""Best published rate of a mixture-of-experts model of this size. Its 16 GPUs communicate; one GPU
does not."""


def _rate(flops_per_second: float) -> str:
    if flops_per_second >= 1e12:
        return f"{flops_per_second / 1e12:.1f} TFLOP/s"
    return f"{flops_per_second / 1e9:.2f} GFLOP/s"


def tables(results: dict[str, Any]) -> list[Table | str]:
    """Return the printed report: speed, time by part, and remarks."""
    return [_speed(results), _profile(results), *_remarks(results)]


def _speed(results: dict[str, Any]) -> Table:
    size = results["slice"]
    table = Table(
        title=f"One training step, {size['layers']} layers, "
        f"{size['batch']} x {size['sequence_length']} tokens, "
        f"on {size['ranks']} x {results['machine']['device']}; rates of one",
        caption=results["note"],
    )
    table.add_column("arm", no_wrap=True)
    for title in ("median", "spread", "tokens/s", "model FLOP/s", "of GEMM", "peak memory"):
        table.add_column(title, justify="right")
    for arm in results["arms"]:
        if arm["status"] != "measured":
            table.add_row(arm["arm"], arm["status"])
            continue
        table.add_row(
            arm["arm"],
            f"{arm['median_seconds'] * 1e3:.1f} ms",
            f"{arm['spread']:.1%}",
            f"{arm['tokens_per_second']:,.0f}",
            _rate(arm["model_flops_per_second"]),
            f"{arm['share_of_gemm']:.1%}",
            size_text(arm["peak_memory_bytes"]),
        )
    return table


def _profile(results: dict[str, Any]) -> Table:
    table = Table(title="Time of one step by part")
    table.add_column("arm", no_wrap=True)
    for part in PARTS:
        table.add_column(part, justify="right")
    for arm in results["arms"]:
        if arm.get("profile"):
            table.add_row(arm["arm"], *(f"{arm['profile']['share'][part]:.1%}" for part in PARTS))
    return table


def _remarks(results: dict[str, Any]) -> list[str]:
    gemm = results["gemm"]
    rates = ", ".join(_rate(rate) for rate in gemm["runs"])
    lines = [f"BF16 matrix product of {gemm['size']}^3, before and after: {rates}"]
    lines += [
        f"{arm['arm']}: {arm['status']}: {arm['reason']}"
        for arm in results["arms"]
        if arm["status"] != "measured"
    ]
    lines += [
        f"drift of {name} over this run: {drift:.1%}" for name, drift in results["drift"].items()
    ]
    if results["reference"]:
        reference = results["reference"]
        lines.append(f"to beat: {_rate(reference['model_flops_per_second'])} ({reference['name']})")
    if results["cpu_overhead"]:
        ratio = results["cpu_overhead"]
        lines.append(
            f"CPU backend over plain torch, {ratio['of']} / {ratio['over']}: "
            f"{ratio['processor']:.2f} in processor time, {ratio['wall']:.2f} in wall time"
        )
    lines.append(f"{results['command']}, commit {results['commit']}, {results['date']}")
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the model FLOP/s of each measured arm as a bar, in the order of the runs."""
    # The canvas is chosen here, so that no display is needed and pyplot's state stays untouched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [arm for arm in results["arms"] if arm["status"] == "measured"]
    small = results["mode"] == "small"
    scale, unit = (1e9, "GFLOP/s") if small else (1e12, "TFLOP/s")
    figure = Figure(figsize=(9, 1.8 + 0.42 * len(arms)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [arm["model_flops_per_second"] / scale for arm in arms]
    bars = axes.barh(range(len(arms)), values, color="#2563eb", height=0.65)
    axes.bar_label(
        bars,
        [
            f" {value:.3g}  ({arm['share_of_gemm']:.0%} of GEMM)"
            for value, arm in zip(values, arms, strict=True)
        ],
    )
    axes.set_yticks(range(len(arms)), [arm["arm"] for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel(f"model {unit}, forward and backward, windows counted")
    if results["reference"]:
        bar = results["reference"]["model_flops_per_second"] / scale
        axes.axvline(
            bar, color="#f59e0b", linestyle="--", label=f"{bar:.0f}: {results['reference']['name']}"
        )
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18), frameon=False, fontsize=8)
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    layers = results["slice"]["layers"]
    heading = f"Training step of {layers} layers on {results['machine']['device']}"
    axes.set_title(
        f"{heading}\n(small mode: means nothing about GPUs)" if small else heading,
        loc="left",
        fontsize=11,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
