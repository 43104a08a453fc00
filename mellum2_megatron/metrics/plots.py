"""The loss curve of a run, drawn from its ``metrics.jsonl``."""

from __future__ import annotations

import math
import os
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
        metrics_path: ``metrics.jsonl`` of the run.
        png_path: picture to write.
        unigram_entropy: reference line: loss of the best guess without context, in nats a token;
            None (default): no line.
        ln_vocab: reference line: loss of a uniform guess, in nats a token; None (default): no line.
        title: title of the picture.

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
    # Drawn first, so that the main curve lies on top.
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
        # Points, not a line, because validations are rare; unclipped at the right edge.
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


def _figure(title: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps global state and may pick an interactive backend.
    figure = Figure(figsize=(9, 5.2), layout="constrained")
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
    # A diverged run logs nan and inf, for which matplotlib would raise.
    shown = [
        value for value in [*losses, *references] if value is not None and math.isfinite(value)
    ]
    low, high = min(shown), max(shown)
    margin = 0.08 * max(high - low, 0.1)
    axes.set_ylim(max(0.0, low - 1.6 * margin), high + margin)


def _token_axis(axes: Axes, records: list[Record]) -> None:
    """Add an axis of tokens along the top, if the records have them."""
    steps, tokens = series(records, "tokens")
    if len(steps) < 2 or tokens[-1] <= 0:
        return
    from mellum2_megatron.metrics.console import short_number

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
    top.xaxis.set_major_formatter(lambda value, _: short_number(value))


def _save(figure: Figure, png_path: str | os.PathLike[str]) -> None:
    with atomic_path(Path(png_path)) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
