"""The bench of inference: its answers against a plain greedy loop, its figures against sums."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conversion.huggingface.timed_engine import transformers_engines
from mellum2_megatron.architecture import PRESETS, find_architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.evaluation.inference import Answer, Bench, figures, real_prompts
from mellum2_megatron.planning.reference_shapes import dense_counterpart
from tests.cli.runner import mellum2
from tests.conversion.test_generation import greedy, make_folder
from tests.small import python_like


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    for seed in range(8):
        (path / f"module_{seed}.py").write_text(python_like(seed))
    return path


def test_engines_answer_as_a_plain_loop_does(folder: Path) -> None:
    prompts = [list(range(10 + row, 30 + row)) for row in range(3)]
    expected = [tuple(greedy(folder, ids, 7)[len(ids) :]) for ids in prompts]
    dense = dense_counterpart(find_architecture(str(folder))[0])
    engines = transformers_engines(str(folder), use_mtp=True, dense=dense)
    assert list(engines) == ["plain", "mtp", "dense"]
    together = engines["plain"].answer(prompts, 7)
    assert [answer.output for answer in together] == expected
    for ids, output in zip(prompts, expected, strict=True):
        (plain,) = engines["plain"].answer([ids], 7)
        (drafted,) = engines["mtp"].answer([ids], 7)
        assert plain.output == drafted.output == output
        assert (plain.drafted, plain.tokens) == (None, 7)
        assert drafted.drafted is not None
        assert 0 <= (drafted.accepted or 0) <= drafted.drafted <= 7
        for answer in (plain, drafted):
            assert 0 < answer.first_token < answer.seconds
    assert len(engines["dense"].answer(prompts, 7)[0].output) == 7
    with pytest.raises(InputError, match="one request at a time"):
        engines["mtp"].answer(prompts, 7)


def _answer(first: float, seconds: float, tokens: int, **drafts: int) -> Answer:
    return Answer(first_token=first, seconds=seconds, tokens=tokens, output="", **drafts)


def test_figures_are_means_over_rounds() -> None:
    rounds = [
        [_answer(1.0, 3.0, 5, drafted=4, accepted=1), _answer(2.0, 4.0, 5, drafted=4, accepted=3)],
        [_answer(3.0, 5.0, 3, drafted=2, accepted=2), _answer(3.0, 7.0, 3, drafted=2, accepted=2)],
    ]
    found = {figure.name: figure for figure in figures(rounds)}
    assert found["first token"].value == (1.5 + 3.0) / 2
    assert found["token"].value == (0.5 + 1.5) / 2
    assert found["request"].value == (3.5 + 6.0) / 2
    assert found["tokens a second"].value == (10 / 4 + 6 / 7) / 2
    assert found["drafts accepted"].value == 8 / 12
    assert found["token"].items == 2
    assert "drafts accepted" not in {f.name for f in figures([[_answer(1.0, 2.0, 4)]])}


def test_prompts_are_real_and_differ(texts: Path) -> None:
    bench = Bench(mode="throughput", prompt=50, output=8, repeats=2, batch=3)
    rounds = real_prompts(lambda text: list(text.encode()), bench, [str(texts)])
    flat = [bytes(ids).decode() for one in rounds for ids in one]
    assert [len(one) for one in rounds] == [3, 3, 3]
    assert len(set(flat)) == 9
    whole = "".join(file.read_text() for file in texts.iterdir())
    assert all(len(text) == 50 for text in flat)
    assert sum(text in whole for text in flat) >= 6  # others reach into the next file
    with pytest.raises(InputError, match="prompts"):
        real_prompts(lambda text: [1], bench, [str(texts)])


def test_command(folder: Path, texts: Path, tmp_path: Path) -> None:
    result = mellum2(
        *("bench-inference", folder, "--use-mtp", "--prompt", "40", "--output", "8"),
        *("--repeats", "2", "--text", texts, "--out", tmp_path / "b.json"),
        *("--plot", tmp_path / "b.png"),
    )
    assert result.code == 0, result
    assert "proof that the bench works" in result.out
    assert "mtp: 100% of the answers equal those of plain" in result.out
    report = json.loads((tmp_path / "b.json").read_text())
    assert list(report["arms"]) == ["plain", "mtp", "dense"]
    assert report["equal"] == {"mtp": 1.0}
    assert report["device"] == "cpu"
    assert report["peak_memory"]["all arms"] > 1e6
    names = [figure["name"] for figure in report["arms"]["mtp"]["figures"]]
    assert names == ["first token", "token", "request", "tokens a second", "drafts accepted"]
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--engine", "sglang"), "--engine sglang"),
        (("--mode", "fast"), "--mode fast"),
        (("--output", "1"), "--output 1"),
        (("--prompt", "120", "--output", "16"), "max_position_embeddings=128"),
        (("--use-mtp", "--mode", "throughput"), "one request at a time"),
        (("--repeats", "0"), "--repeats"),
        (("--plot", "a.pdf"), "PNG"),
    ],
)
def test_bad_words(folder: Path, words: tuple[str, ...], named: str) -> None:
    mellum2("bench-inference", folder, "--prompt", "40", "--output", "8", *words).refused(named)


def test_a_draft_needs_a_head(tmp_path: Path) -> None:
    plain = make_folder(tmp_path / "hf", num_mtp_layers=0, mtp_layer_types=[])
    mellum2(*("bench-inference", plain, "--use-mtp", "--prompt", "40", "--output", "8")).refused(
        "no MTP head"
    )


def test_the_counterpart_of_the_12b_is_the_report_s() -> None:
    dense = dense_counterpart(PRESETS["mellum2-12b"])
    assert 6.9e9 < dense.num_parameters() < 7.7e9
