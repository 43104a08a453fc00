"""Pictures of a run's ``metrics.jsonl``: the loss curve, and how evenly each layer's experts are
used."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import atomic_path
from mellum2_megatron.metrics.log import Record, read_metrics, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_LM, _MTP, _VALID = "#2563eb", "#f59e0b", "#0f172a"
_LOAD = re.compile(r"expert_load/(?P<layer>.+)/max_over_mean")


def plot_loss(
    metrics_path: str | os.PathLike[str],
    png_path: str | os.PathLike[str],
    *,
    unigram_entropy: float | None = None,
    ln_vocab: float | None = None,
    title: str = "Mellum 2 training loss",
) -> None:
    """Draw the training loss, the MTP loss and the validation loss over steps.

    Args:
        metrics_path: ``metrics.jsonl``.
        png_path: picture to write.
        unigram_entropy: nats; drawn as the floor of predictors that ignore context.
        ln_vocab: nats; drawn as the loss of a uniform guess.
        title: of the picture.

    Raises:
        InputError: the file is missing, damaged, or holds no training loss.
    """
    records = read_metrics(metrics_path)
    steps, losses = series(records, "lm_loss")
    if not steps:
        raise InputError(
            str(metrics_path),
            rule="it holds no lm_loss",
            fix="name the metrics.jsonl of a training run",
        )
    figure, axes = _figure(title)
    mtp_steps, mtp_losses = series(records, "mtp_loss")
    if mtp_steps:
        axes.plot(
            mtp_steps,
            mtp_losses,
            color=_MTP,
            linewidth=1.4,
            label="MTP (token after next), training",
        )
    axes.plot(steps, losses, color=_LM, linewidth=1.8, label="next token, training")
    valid_steps, valid_losses = series(records, "lm_loss", "valid")
    if valid_steps:
        axes.plot(
            valid_steps,
            valid_losses,
            color=_VALID,
            linewidth=0,
            marker="o",
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=1.2,
            label="next token, validation",
            zorder=5,
            clip_on=False,
        )
        axes.annotate(
            f"{valid_losses[-1]:.2f}",
            (valid_steps[-1], valid_losses[-1]),
            textcoords="offset points",
            xytext=(0, -16),
            ha="right",
            fontsize=10,
            fontweight="bold",
            color=_VALID,
        )
    for value, label in (
        (ln_vocab, "uniform guess"),
        (unigram_entropy, "best without context (unigram entropy)"),
    ):
        if value is not None:
            _reference_line(axes, value, f"{label}: {value:.2f}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross entropy (nats per token)")
    axes.set_xlim(0, max([*steps, *valid_steps]))
    _limits(axes, [*losses, *mtp_losses, *valid_losses], [unigram_entropy, ln_vocab])
    _token_axis(axes, records)
    figure.legend(frameon=False, loc="outside lower center", ncols=3, labelcolor=_INK)
    _save(figure, png_path)


def plot_expert_load(
    metrics_path: str | os.PathLike[str],
    png_path: str | os.PathLike[str],
    *,
    title: str = "Load of the busiest expert",
) -> None:
    """Draw, over layers and steps, how many times its even share each layer's busiest expert
    received.

    Raises:
        InputError: the file is missing, damaged, or holds no expert loads.
    """
    records = read_metrics(metrics_path)
    names = sorted(
        {name for record in records for name in record.values if _LOAD.fullmatch(name)},
        key=_layer_order,
    )
    if not names:
        raise InputError(
            str(metrics_path),
            rule="it holds no expert_load/*/max_over_mean",
            fix="name the metrics of an MoE run",
        )
    steps = sorted(
        {record.step for record in records if record.kind == "train" and names[0] in record.values}
    )
    column = {step: index for index, step in enumerate(steps)}
    grid = np.full((len(names), len(steps)), np.nan)
    for row, name in enumerate(names):
        for step, value in zip(*series(records, name), strict=True):
            if step in column:
                grid[row, column[step]] = value
    figure, axes = _figure(title, height=1.8 + 0.28 * max(len(names), 6))
    axes.grid(visible=False)
    edges = _edges(steps)
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(names) + 1),
        grid,
        cmap="viridis",
        vmin=1.0,
        vmax=max(2.0, float(np.nanmax(grid))),
    )
    axes.set_yticks(np.arange(len(names)) + 0.5, [_layer_label(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("optimizer step")
    bar = figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label("times an even share", color=_MUTED)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_MUTED, length=0)
    _save(figure, png_path)


def _figure(title: str, height: float = 5.2) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps global state and may pick an interactive backend.
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", color=_INK, pad=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0)
    axes.xaxis.label.set_color(_MUTED)
    axes.yaxis.label.set_color(_MUTED)
    return figure, axes


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


def _limits(axes: Axes, losses: list[float], references: list[float | None]) -> None:
    shown = [
        value for value in [*losses, *references] if value is not None and math.isfinite(value)
    ]
    low, high = min(shown), max(shown)
    margin = 0.08 * max(high - low, 0.1)
    axes.set_ylim(max(0.0, low - 1.6 * margin), high + margin)


def _token_axis(axes: Axes, records: list[Record]) -> None:
    """Tokens along the top, when the log holds them."""
    steps, tokens = series(records, "tokens")
    if len(steps) < 2 or tokens[-1] <= 0:
        return
    from mellum2_megatron.metrics.console import short_number

    # Tokens a step may grow during the run; beyond its end the average goes on.
    known_steps, known_tokens = [0, *steps, 2 * steps[-1]], [0.0, *tokens, 2 * tokens[-1]]

    def to_tokens(step: Any) -> Any:
        return np.interp(step, known_steps, known_tokens)

    def to_steps(count: Any) -> Any:
        return np.interp(count, known_tokens, known_steps)

    top = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
    top.set_xlabel("tokens", color=_MUTED)
    top.tick_params(colors=_MUTED, length=0)
    top.spines["top"].set_visible(False)
    top.xaxis.set_major_formatter(lambda value, _: short_number(value))


def _edges(steps: list[int]) -> Any:
    """Cell borders half-way between logged steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (np.array(steps[1:]) + np.array(steps[:-1])) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def _layer_order(name: str) -> tuple[bool, str]:
    layer = name.split("/")[1]
    return not layer.startswith("layer_"), layer


def _layer_label(name: str) -> str:
    layer = name.split("/")[1]
    return (
        f"layer {int(layer.removeprefix('layer_'))}"
        if layer.startswith("layer_")
        else layer.upper()
    )


def _save(figure: Figure, png_path: str | os.PathLike[str]) -> None:
    with atomic_path(Path(png_path)) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
