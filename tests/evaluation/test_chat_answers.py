"""Answers to held-out conversations, by models that know them, or their form alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.chat.packs import prepare_chat
from mellum2_megatron.data.chat.samples import chat_tokenizer
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer
from mellum2_megatron.evaluation import Figure, evaluate, plan
from mellum2_megatron.evaluation.chat_answers import Question, questions
from tests.data.chats import turn, write_rows, write_tokenizer
from tests.evaluation.models import ByteModel

ROWS = [
    {
        "messages": [
            turn("user", f"{i}?"),
            turn("assistant", f"It is `{i}`."),
            turn("user", "Twice?"),
            turn("assistant", f"Twice is `{2 * i}`."),
        ]
    }
    for i in range(40)
]
TINY = Mellum2Architecture.preset("mellum2-tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    prepare_chat(
        folder / "packs",
        [write_rows(folder / "a.jsonl", ROWS)],
        tokenizer=write_tokenizer(folder / "tokenizer"),
        mode="instruct",
        length=256,
        valid_fraction=0.3,
        workers=1,
        progress=False,
    )
    return folder


class Pupil(ByteModel):
    """Gives prepared answers: of a prompt's own question, changed by a rule."""

    def __init__(self, folder: Path, known: Sequence[Question], rule: str) -> None:
        self._tokenizer = load_tokenizer(folder / "tokenizer")
        self._known = {tuple(one.prompt): one.answer for one in known}
        self._rule = rule

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def continue_greedily(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[int]:
        """Return the known answer, or one that the rule makes of it."""
        answer = self._known[tuple(prompt)]
        if self._rule == "endless":
            return answer[:-1]
        if self._rule == "form":
            text = self.decode(answer).replace("`", "`7", 1)
            return (
                list(chat_tokenizer_ids(self._tokenizer, text[: -len("<|im_end|>")])) + answer[-1:]
            )
        return answer


def chat_tokenizer_ids(tokenizer: object, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]
    return ids


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("right", [1, 1, 1]), ("form", [1, 1, 0]), ("endless", [0, 0, 0])],
)
def test_answers_are_judged(data: Path, rule: str, expected: list[float]) -> None:
    packs = data / "packs"
    model = Pupil(data, list(questions(packs, "valid")), rule)
    planned = plan(TINY, ["chat_answers"], [f"chat_answers.data={packs}"])
    outcome = evaluate(model, planned, name="model", suites=["chat_answers"]).results[0][1]
    figures: dict[str, Figure] = {figure.name: figure for figure in outcome.figures}
    assert [figures[name].value for name in ("ended", "in form", "right")] == expected
    # ByteModel gives every token of a continuation a tenth.
    assert figures["loss"].value == pytest.approx(2.302585)


def test_every_turn_is_asked_with_what_stands_before_it(data: Path) -> None:
    tokenizer = chat_tokenizer(data / "tokenizer")
    found = {
        (
            tokenizer.decode(one.prompt, skip_special_tokens=False),
            tokenizer.decode(one.answer, skip_special_tokens=False),
        )
        for split in ("train", "valid")
        for one in questions(data / "packs", split)
    }
    expected = set()
    for i in range(40):
        first = f"<|im_start|>user\n{i}?<|im_end|>\n<|im_start|>assistant\n"
        answer = f"It is `{i}`.<|im_end|>"
        second = "\n<|im_start|>user\nTwice?<|im_end|>\n<|im_start|>assistant\n"
        expected |= {(first, answer), (first + answer + second, f"Twice is `{2 * i}`.<|im_end|>")}
    assert found == expected


def test_bad_data_is_refused(data: Path) -> None:
    for settings, named in (
        ([], "it names no conversations"),
        ([f"chat_answers.data={data}"], "packs.json"),
        ([f"chat_answers.data={data / 'packs'}", "chat_answers.items=0"], "chat_answers.items=0"),
    ):
        with pytest.raises(InputError, match=named):
            plan(TINY, ["chat_answers"], settings)
    small = TINY.replace(max_position_embeddings=128)
    with pytest.raises(InputError, match="its packs have 256 tokens, the model reads 128"):
        plan(small, ["chat_answers"], [f"chat_answers.data={data / 'packs'}"])
