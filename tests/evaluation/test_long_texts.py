"""Tracing and aggregation asked of models that answer by a rule, not by weights."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.evaluation import Continuation, evaluate, plan
from mellum2_megatron.evaluation.long_texts import lengths_of, scatter
from tests.evaluation.models import ByteModel
from tests.small import python_like


class Rule(ByteModel):
    """Answers as a rule on the prompt says; every token of another answer costs 1 nat."""

    def __init__(self, hops: int = 99) -> None:
        self.hops = hops
        self.prompts: list[str] = []

    def answer(self, text: str) -> str:
        """Follow at most ``hops`` assignments back, or count the words."""
        last = text.splitlines()[-1]
        if last == 'most_common = "':
            counts = Counter(re.findall(r'^log\("(\w+)"\)$', text, re.MULTILINE))
            return f'{counts.most_common(1)[0][0]}"'
        found = re.fullmatch(r"assert (\w+) ==", last)
        assert found is not None
        name = found[1]
        for _ in range(self.hops + 1):
            value = re.search(rf"^{name} = (\w+)$", text, re.MULTILINE)
            if value is None:
                break
            name = value[1]
        return f" {name}"

    def score_continuations(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Continuation]:
        """Return certainty for the rule's answer."""
        text = self.decode(prompt)
        self.prompts.append(text)
        right = self.answer(text)
        return [
            Continuation(
                log_probability=0.0 if self.decode(one) == right else -float(len(one)),
                is_greedy=self.decode(one) == right,
            )
            for one in continuations
        ]


class Hesitant(Rule):
    """Holds a token of the right answer for a little more likely than one of another."""

    def score_continuations(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Continuation]:
        """Return a tenth of a nat a token more for the rule's answer."""
        right = self.answer(self.decode(prompt))
        return [
            Continuation(
                log_probability=-len(one) * (0.9 if self.decode(one) == right else 1.0),
                is_greedy=False,
            )
            for one in continuations
        ]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for seed in range(4):
        (tmp_path / f"module_{seed}.py").write_text(python_like(seed) * 3)
    return tmp_path


def _run(model: ByteModel, name: str, texts: Path, *more: str) -> dict[tuple[int, str], float]:
    settings = [f"{name}.text={texts}", f"{name}.items=6", *more]
    planned = plan(model.architecture, [name], settings)
    (result,) = evaluate(model, planned, name="m", suites=[name]).results
    return {(int(f.where["length"]), f.name): f.value for f in result[1].figures}


def test_a_reader_of_chains_traces(texts: Path) -> None:
    model = Rule(hops=2)
    figures = _run(model, "tracing", texts, "tracing.lengths=300,512")
    assert figures == dict.fromkeys(
        [(length, name) for length in (300, 512) for name in ("found", "preferred")], 1.0
    )
    for prompt in model.prompts:
        assert len(prompt) + 6 <= 512
        assert len(re.findall(r"^[A-Z]+_0 = \d{5}$", prompt, re.MULTILINE)) == 4
        assert len(re.findall(r"^[A-Z]+_[12] = [A-Z]+_[01]$", prompt, re.MULTILINE)) == 8
    # A name is given its value before it is read.
    names = [line.split()[0] for line in model.prompts[0].splitlines() if re.match("[A-Z]+_", line)]
    for chain in {name[:-2] for name in names}:
        assert [name for name in names if name.startswith(chain)] == [
            f"{chain}_{n}" for n in (0, 1, 2)
        ]


def test_a_reader_of_one_hop_does_not(texts: Path) -> None:
    figures = _run(Rule(hops=1), "tracing", texts, "tracing.lengths=300")
    assert set(figures.values()) == {0.0}


def test_a_counter_of_words_aggregates(texts: Path) -> None:
    model = Rule()
    figures = _run(model, "aggregation", texts, "aggregation.lengths=512")
    assert set(figures.values()) == {1.0}
    for prompt in model.prompts:
        counts = Counter(re.findall(r'^log\("(\w+)"\)$', prompt, re.MULTILINE))
        assert sorted(counts.values()) == [3, 3, 3, 3, 3, 8]
    assert len({re.findall(r'log\("(\w+)"', prompt)[0] for prompt in model.prompts}) > 1
    # Words of different lengths are compared per token.
    hesitant = _run(Hesitant(), "aggregation", texts, "aggregation.lengths=512")
    assert hesitant == {(512, "found"): 0.0, (512, "preferred"): 1.0}


def test_the_same_settings_ask_the_same(texts: Path) -> None:
    for name in ("tracing", "aggregation"):
        models = [Rule() for _ in range(3)]
        for model, seed in zip(models, (1, 1, 2), strict=True):
            _run(model, name, texts, f"{name}.lengths=512", f"{name}.seed={seed}")
        assert models[0].prompts == models[1].prompts != models[2].prompts


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("tracing.lengths=100", "256 to max_position_embeddings=512"),
        ("tracing.lengths=513", "256 to max_position_embeddings=512"),
        ("tracing.chains=1", "2 to 12 chains"),
        ("tracing.hops=0", "tracing.hops=0"),
        ("aggregation.lengths=511", "512 to max_position_embeddings=512"),
        ("aggregation.words=13", "2 to 12"),
        ("aggregation.seldom=8", "below often=8"),
    ],
)
def test_settings_that_cannot_be(setting: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        plan(ByteModel.architecture, [setting.partition(".")[0]], [setting])


def test_a_task_longer_than_its_text(texts: Path) -> None:
    for name, setting in (("tracing", "tracing.hops=40"), ("aggregation", "aggregation.often=90")):
        with pytest.raises(InputError, match="alone have"):
            _run(Rule(), name, texts, setting, f"{name}.lengths=512")


def test_lines_are_scattered_in_order() -> None:
    lines = [[n] for n in range(20)]
    given: list[Any] = [[100], [101], [102]]
    result = scatter(lines, given, random.Random(1))
    assert [one for one in result if one[0] >= 100] == given
    assert [one for one in result if one[0] < 100] == lines
    architecture = ByteModel.architecture
    assert lengths_of(architecture, (), 64) == (64, 128, 256, 512)
    assert lengths_of(architecture, (300, 200, 300), 64) == (200, 300)
