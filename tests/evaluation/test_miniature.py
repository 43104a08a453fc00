"""Miniature tasks on models whose answers are known, and items found in training data."""

from __future__ import annotations

import ast
import difflib
import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.evaluation import Continuation, Outcome, evaluate, plan
from mellum2_megatron.evaluation.contamination import find_overlaps, open_training_data
from mellum2_megatron.evaluation.evaluating import item_texts
from mellum2_megatron.evaluation.held_out import own_documents
from mellum2_megatron.evaluation.line_tasks import edit_similarity
from mellum2_megatron.evaluation.multiple_choice import Settings, questions
from tests.cli.runner import mellum2
from tests.evaluation.models import ByteModel
from tests.small import python_like

SPECIAL = {"eos": 1, "fim_prefix": 2, "fim_middle": 3, "fim_suffix": 4}


class Knows(ByteModel):
    """Continues every prompt as a document goes on that it knows, and knows what is true."""

    special_ids = SPECIAL

    def __init__(self, documents: Sequence[str], wrong: str = "") -> None:
        self.documents = documents
        self.wrong = wrong
        self.prompts: list[list[int]] = []

    def continue_greedily(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[int]:
        """Return what stands between the two parts of the prompt in a known document."""
        self.prompts.append(list(prompt))
        text = bytes(prompt)
        before, after = text.decode("latin-1"), "\n"
        if prompt[0] == SPECIAL["fim_suffix"]:
            after, _, before = text[1:-1].decode("latin-1").partition("\x02")
        elif prompt[0] == SPECIAL["fim_prefix"]:
            before, _, after = text[1:-1].decode("latin-1").partition("\x04")
        for document in self.documents:
            start = document.find(before)
            if start >= 0:
                middle = document[start + len(before) :].partition(after)[0]
                answer = (self.wrong + middle + after).encode()
                return [*answer[:max_new_tokens], *([1] if 1 in stop else [])]
        raise AssertionError(before)

    def score_continuations(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Continuation]:
        """Prefer what is true: sums by Python, and the answers of our own questions."""
        text = self.decode(prompt)
        last = text.splitlines()[-1]
        if last.endswith("="):
            truth = str(eval(last[:-1]))
        else:
            item = next(item for item in questions(Settings()) if item.prompt == text)
            truth = item.choices[item.answer]
        right = [self.decode(one) == f" {truth}" for one in continuations]
        return [Continuation(log_probability=-1.0 if it else -90.0, is_greedy=it) for it in right]


def run(model: ByteModel, measure: str, *settings: str) -> Outcome:
    planned = plan(model.architecture, [measure], settings)
    return evaluate(model, planned, name="model", suites=[measure]).results[0][1]


def values(outcome: Outcome) -> list[float]:
    return [figure.value for figure in outcome.figures]


def test_own_code_is_python_and_long_enough() -> None:
    documents = own_documents()
    assert len(documents) >= 10
    for text in documents:
        ast.parse(text)


@pytest.mark.parametrize("measure", ["completion", "fim"])
def test_a_model_that_knows_the_file_is_right(measure: str) -> None:
    documents = own_documents()
    right = Knows(documents)
    outcome = run(right, measure)
    assert values(outcome) == [1, 1, 1]
    assert len({json.dumps(item) for item in outcome.details}) > 30
    wrong = run(Knows(documents, wrong=") "), measure)
    exact, similarity, parses = values(wrong)
    assert exact == 0
    assert 0.5 < similarity < 1
    assert parses < 0.2


def test_fim_prompts_have_the_order_of_training() -> None:
    spm, psm = Knows(own_documents()), Knows(own_documents())
    run(spm, "fim", "fim.items=5")
    run(psm, "fim", "fim.items=5", "fim.order=psm")
    for first, second in zip(spm.prompts, psm.prompts, strict=True):
        assert (first[0], second[0], first[-1], second[-1]) == (4, 2, 3, 3)
        suffix, _, prefix = bytes(first[1:-1]).partition(b"\x02")
        assert bytes(second[1:-1]).partition(b"\x04")[::2] == (prefix, suffix)
        assert len(first) == len(second) <= 512


def test_fim_without_sentinels_says_so() -> None:
    outcome = run(ByteModel(), "fim")
    assert outcome.figures == ()
    assert "no fill-in-the-middle tokens" in outcome.notes[0]


def test_edit_similarity_equals_a_plain_table() -> None:
    rng = random.Random(3)
    for _ in range(30):
        first, second = ("".join(rng.choices("abc", k=rng.randrange(7))) for _ in range(2))
        table = {(i, 0): i for i in range(8)} | {(0, j): j for j in range(8)}
        for i, a in enumerate(first, 1):
            for j, b in enumerate(second, 1):
                table[i, j] = min(
                    table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b)
                )
        longest = max(len(first), len(second)) or 1
        expected = 1 - table[len(first), len(second)] / longest
        assert edit_similarity(first, second) == pytest.approx(expected)
    assert difflib.SequenceMatcher(None, "same", "same").ratio() == edit_similarity("same", "same")


def test_arithmetic_and_choices_of_a_model_that_knows() -> None:
    model = Knows([])
    assert values(run(model, "arithmetic")) == [1, 1, 1, 1]
    assert values(run(model, "multiple_choice")) == [1, 1]
    # One that takes all for equal is never right by preference; by chance the first answer is.
    assert values(run(ByteModel(), "arithmetic")) == [0, 0, 0, 0]


def test_longer_answers_are_normed_by_characters(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text('[{"question": "?", "choices": ["a", "bbbbb"], "answer": 1}]')

    class Fixed(ByteModel):
        def score_continuations(
            self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
        ) -> list[Continuation]:
            assert self.decode(prompt) == "Question: ?\nAnswer:"
            assert [self.decode(one) for one in continuations] == [" a", " bbbbb"]
            return [Continuation(log_probability=v, is_greedy=False) for v in (-2.0, -5.0)]

    assert values(run(Fixed(), "multiple_choice", f"multiple_choice.file={file}")) == [0, 1]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("completion.items=0", "completion.items=0"),
        ("completion.items=100000", "lower completion.items"),
        ("fim.order=mps", "fim.order=mps"),
        ("arithmetic.digits=12", "arithmetic.digits=12"),
        ("arithmetic.shots=-1", "arithmetic.shots=-1"),
        ("multiple_choice.file=/nowhere.json", "multiple_choice.file=/nowhere.json"),
    ],
)
def test_bad_settings_are_refused(setting: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        run(Knows(own_documents()), setting.partition(".")[0], setting)


@pytest.mark.parametrize(
    "rows",
    [
        "[]",
        "{}",
        '[{"question": "?", "choices": ["a"], "answer": 0}]',
        '[{"question": "?", "choices": ["a", "b"], "answer": 2}]',
        '[{"question": "?", "choices": ["a", "b"], "answer": true}]',
        "[",
    ],
)
def test_questions_that_are_none(rows: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(rows)
    with pytest.raises(InputError, match=r"a\.json"):
        plan(
            ByteModel.architecture, ["multiple_choice"], [f"multiple_choice.file={tmp_path}/a.json"]
        )


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packs of random text, with four of our blocks among it."""
    folder = tmp_path_factory.mktemp("corpus")
    output = tmp_path_factory.mktemp("data") / "packs"
    for seed in range(40):
        (folder / f"module_{seed}.py").write_text(python_like(seed))
    for number, text in enumerate(own_documents()[:4]):
        (folder / f"leaked_{number}.py").write_text(text)
    result = mellum2(
        *("data", "prepare", "--input", folder, "--output", output),
        *("--vocab-size", "360", "--workers", "1", "--sequence-length", "256"),
        *("--valid-fraction", "0.05", "--no-filters"),
    )
    assert result.code == 0, result
    return output


def test_items_of_the_training_data_are_found(packs: Path) -> None:
    from mellum2_megatron.data.tokens.tokenizer import load_tokenizer

    data = open_training_data(packs, 24)
    tokenizer = load_tokenizer(packs / "tokenizer")

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    planned = plan(ByteModel.architecture, ["miniature"], ["completion.items=20", "fim.items=1"])
    texts = item_texts(planned)
    assert set(texts) == {"completion", "fim", "multiple_choice"}
    completion, _, choices = find_overlaps(encode, texts, data)
    leaked = [
        number for number, text in enumerate(texts["completion"]) if text in own_documents()[:4]
    ]
    assert len(leaked) == 8
    assert list(completion.shared) == leaked
    assert "8 of 20 items" in completion.line(packs, 24)
    assert choices.shared == {}
    assert "no item" in choices.line(packs, 24)


def test_other_folders_are_no_training_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--training-data"):
        open_training_data(tmp_path, 24)
    with pytest.raises(InputError, match="--overlap-tokens"):
        open_training_data(tmp_path, 0)
