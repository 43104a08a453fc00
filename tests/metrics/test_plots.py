"""Plots: figures show the logged numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.metrics import plots
from mellum2_megatron.metrics.log import Record
from mellum2_megatron.metrics.plots import Curves, plot_loss, plot_runs, smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@pytest.fixture
def log(tmp_path: Path) -> Path:
    lines = []
    for step in (10, 20, 30):
        values = {"lm_loss": 8 - step / 10, "mtp_loss": 9 - step / 10, "tokens": step * 1000}
        lines.append({"kind": "train", "step": step, **values})
    lines.append({"kind": "valid", "step": 20, "lm_loss": 6.5})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved."""
    saved: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return saved


def test_loss_curve(log: Path, tmp_path: Path, figures: list[Figure]) -> None:
    plot_loss(log, tmp_path / "loss.png", unigram_entropy=6.25, ln_vocab=math.log(4096))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    (axes,) = figures[0].axes
    curves = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }
    assert curves["next token, training"] == ([10, 20, 30], [7.0, 6.0, 5.0])
    assert curves["MTP (token after next), training"] == ([10, 20, 30], [8.0, 7.0, 6.0])
    assert curves["next token, validation (last 6.50)"] == ([20], [6.5])
    assert {y[0] for x, y in curves.values() if x == [0, 1]} == {6.25, math.log(4096)}
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"uniform guess: 8.32", "best without context (unigram entropy): 6.25"}
    low, high = axes.get_ylim()
    assert low < 5.0
    assert high > math.log(4096)


def test_a_loss_that_diverged_is_drawn_where_it_is_finite(log: Path, tmp_path: Path) -> None:
    with log.open("a") as file:
        file.write('{"kind": "train", "step": 40, "lm_loss": "nan"}\n')
        file.write('{"kind": "train", "step": 50, "lm_loss": "inf"}\n')
    plot_loss(log, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_logs_without_the_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "grad_norm": 1.0}\n')
    with pytest.raises(InputError, match="no lm_loss"):
        plot_loss(path, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def _run(name: str, losses: list[float], tokens_a_step: float = 10.0) -> Curves:
    records = [
        Record(kind="train", step=step, values={"lm_loss": loss, "tokens": step * tokens_a_step})
        for step, loss in enumerate(losses, 1)
    ]
    return Curves(name=name, records=records, recipe="tiny")


def test_runs_are_compared_over_the_chosen_axis(tmp_path: Path, figures: list[Figure]) -> None:
    runs = [_run("a", [3.0, 2.0]), _run("b", [4.0, 1.0], tokens_a_step=100.0)]
    plot_runs(runs, tmp_path / "x.png", metrics=("lm_loss", "tokens"), against="tokens")
    losses, tokens = figures[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert drawn == {"a (tiny)": [[10, 3], [20, 2]], "b (tiny)": [[100, 4], [200, 1]]}
    assert tokens.lines[1].get_ydata().tolist() == [100, 200]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(drawn)


def test_an_unknown_metric_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean 'lm_loss'; there are lm_loss, tokens"):
        plot_runs([_run("a", [3.0])], tmp_path / "x.png", metrics=("lm_los",))
    assert not (tmp_path / "x.png").exists()


def test_smoothing_keeps_a_line_and_leaves_out_what_is_not_finite() -> None:
    line = [2.0 * index for index in range(200)]
    means, window = smoothed(line)
    assert window == 7
    assert means == pytest.approx(line)
    line[100] = math.nan
    means, _ = smoothed(line)
    neighbours = [line[index] for index in range(97, 104) if index != 100]
    assert means[100] == pytest.approx(sum(neighbours) / 6)
    assert means[103] == pytest.approx(sum(line[101:107]) / 6)
