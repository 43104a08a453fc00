"""Measures on models whose figures are known in advance, their plans, and their intervals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.evaluation import Figure, evaluate, plan
from mellum2_megatron.evaluation.position_loss import ranges
from tests.evaluation.models import ByteModel, Reader
from tests.small import python_like

TINY = Mellum2Architecture.preset("mellum2-tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for seed in range(30):
        (folder / f"module_{seed}.py").write_text(python_like(seed))
    return folder


def run(model: ByteModel, measure: str, *settings: str) -> list[Figure]:
    planned = plan(model.architecture, [measure], settings)
    report = evaluate(model, planned, name="model", suites=[measure])
    return list(report.results[0][1].figures)


def test_position_loss_is_the_mean_of_each_range(texts: Path) -> None:
    figures = run(
        ByteModel(), "position_loss", f"position_loss.text={texts}", "position_loss.texts=3"
    )
    for figure in figures:
        first, last = int(figure.where["first"]), int(figure.where["last"])
        assert figure.value == pytest.approx((first + last) / 2 / 1000)
        assert figure.items == 3
    places = [(figure.where["first"], figure.where["last"]) for figure in figures]
    assert places == [(1, 511), (1, 63), (64, 127), (128, 255), (256, 511)]


@pytest.mark.parametrize(("length", "first"), [(2, 1), (2, 64), (65, 64), (100, 64), (512, 3)])
def test_ranges_hold_every_position_once(length: int, first: int) -> None:
    positions = [place for start, end in ranges(length, first) for place in range(start, end + 1)]
    assert positions == list(range(1, length))


def test_a_needle_is_found_where_it_is_read(texts: Path) -> None:
    settings = [f"needle.text={texts}", "needle.lengths=256,512", "needle.items=21"]
    everything, half = Reader(seen=512), Reader(seen=256)
    figures = {
        (figure.name, figure.where["length"]): figure.value
        for figure in run(everything, "needle", *settings)
    }
    assert figures["found", 256] == figures["found", 512] == figures["preferred", 512] == 1
    for figure in run(half, "needle", *settings):
        if figure.name != "answer":
            # Depths are even: half of the needles of 512 tokens lie in the last 256.
            assert figure.value == pytest.approx(
                1 if figure.where["length"] == 256 else 0.5, abs=0.1
            )
    nothing = run(ByteModel(), "needle", *settings)
    assert {figure.value for figure in nothing if figure.name != "answer"} == {0}
    for prompt in everything.prompts:
        assert len(re.findall(r"^ACCESS_CODE_\w+ = \d{5}$", prompt, re.MULTILINE)) == 1
    lengths = [len(prompt) + len(" 12345") for prompt in everything.prompts]
    # Whole lines fill a text, so that the last may not fit.
    assert all(
        size - 100 < length <= size
        for length, size in zip(lengths, [256] * 21 + [512] * 21, strict=True)
    )


def test_the_same_seed_asks_the_same(texts: Path) -> None:
    settings = [f"needle.text={texts}", "needle.lengths=256", "needle.items=4"]
    first, again, other = Reader(512), Reader(512), Reader(512)
    run(first, "needle", *settings)
    run(again, "needle", *settings)
    run(other, "needle", *settings, "needle.seed=2")
    assert first.prompts == again.prompts
    assert not set(first.prompts) & set(other.prompts)


def test_intervals() -> None:
    mean = Figure.mean("loss", [1.0, 2.0, 3.0], "nats")
    # 1.96 standard errors of 1 / sqrt(3).
    assert (mean.low, mean.high) == (
        pytest.approx(0.8684, abs=1e-4),
        pytest.approx(3.1316, abs=1e-4),
    )
    assert Figure.mean("loss", [1.0], "nats").low is None
    # Wilson's interval of 8 in 10, and of 0 in 10, by R's binom.confint.
    share = Figure.share("found", [True] * 8 + [False] * 2)
    assert (share.low, share.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    none = Figure.share("found", [False] * 10)
    assert (none.low, none.high) == (0, pytest.approx(0.2775, abs=1e-4))


def test_interval_of_a_share_of_trials_in_groups() -> None:
    # One trial an item is Wilson's own interval; the same answers in groups of equals count once.
    single = Figure.pooled_share("kept", [(1, 1)] * 80 + [(0, 1)] * 20)
    share = Figure.share("kept", [True] * 80 + [False] * 20)
    assert (single.low, single.high) == pytest.approx((share.low, share.high), abs=1e-3)
    groups = Figure.pooled_share("kept", [(50, 50)] * 80 + [(0, 50)] * 20)
    assert groups.value == 0.8
    assert (groups.low, groups.high) == pytest.approx((share.low, share.high), abs=1e-3)
    # Groups that resemble each other more than chance would are no more than all trials apart.
    even = Figure.pooled_share("kept", [(4, 5)] * 20)
    assert (even.low, even.high) == (
        pytest.approx(0.7112, abs=1e-4),
        pytest.approx(0.8666, abs=1e-4),
    )
    for rare in ([(0, 9), (1, 9)], [(0, 9)], [(9, 9), (9, 9)]):
        figure = Figure.pooled_share("kept", rare)
        assert 0 <= (figure.low or 0) <= figure.value <= (figure.high or 0) <= 1


def test_a_result_has_settings_seeds_and_versions(texts: Path, tmp_path: Path) -> None:
    settings = [f"needle.text={texts}", "needle.items=2", f"position_loss.text={texts}"]
    planned = plan(TINY, ["long"], settings)
    report = evaluate(ByteModel(), planned, name="runs/a", suites=["long"])
    report.write(tmp_path / "eval.json")
    written = json.loads((tmp_path / "eval.json").read_text())
    assert [measure["name"] for measure in written["measures"]] == ["position_loss", "needle"]
    assert written["measures"][1]["settings"]["seed"] == 1
    assert written["measures"][1]["settings"]["items"] == 2
    assert len(written["measures"][1]["details"]) == 2 * 4
    assert written["measures"][0]["details"][0]["64..127"] == pytest.approx(0.0955)
    assert written["packages"]["torch"]
    assert written["code"]["version"]


@pytest.mark.parametrize(
    ("suite", "settings", "named"),
    [
        ("longer", [], ["--suite longer", "did you mean 'long'"]),
        ("long", ["needle.item=3"], ["needle.item=3", "did you mean 'needle.items'"]),
        ("needle", ["position_loss.texts=3"], ["position_loss.texts"]),
        ("long", ["needle.items"], ["MEASURE.SETTING=VALUE"]),
        ("long", ["needle.items=few"], ["needle.items", "a whole number"]),
        ("long", ["needle.items=0"], ["needle.items=0"]),
        ("long", ["needle.lengths=256,513"], ["needle.lengths=513", "512"]),
        ("long", ["needle.lengths=8"], ["needle.lengths=8", "64"]),
        ("long", ["needle.choices=1"], ["needle.choices=1"]),
        ("long", ["needle.choices=10", "needle.digits=1"], ["needle.choices=10"]),
        ("long", ["position_loss.length=1024"], ["position_loss.length=1024", "512"]),
        ("long", ["position_loss.first_range=0"], ["position_loss.first_range=0"]),
    ],
)
def test_bad_settings_are_refused(suite: str, settings: list[str], named: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        plan(TINY, [suite], settings)
    for text in named:
        assert text in str(caught.value)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text("x = 1\n" * 20)
    with pytest.raises(InputError, match="0 documents have 512 tokens"):
        run(ByteModel(), "position_loss", f"position_loss.text={tmp_path}")
    with pytest.raises(InputError, match="the texts of the filler have 120 tokens"):
        run(ByteModel(), "needle", f"needle.text={tmp_path}")
