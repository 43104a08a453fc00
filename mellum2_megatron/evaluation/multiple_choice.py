"""Multiple choice: which of four answers is the most likely one?

Scored as lm-evaluation-harness scores such tasks: ``acc`` by the log-probability of an answer,
``acc_norm`` by the same divided by its characters. `tests.evaluation.test_harness` compares the two
on the same items.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import read_text
from mellum2_megatron.common.json_files import parse_json
from mellum2_megatron.evaluation.measure import Figure, Measure, Outcome
from mellum2_megatron.evaluation.model import EvaluatedModel

NAME = "multiple_choice"
_FILE = "questions.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One item.

    Attributes:
        question: its text.
        choices: the answers.
        answer: place of the right one, from 0.
    """

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """Text in front of an answer, which begins with a blank."""
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the measure.

    Attributes:
        file: JSON file of one's own questions, a list of ``{"question", "choices", "answer"}`` with
            the place of the right answer from 0; empty (default): the project's.
    """

    file: str = ""


def check(_architecture: Mellum2Architecture, settings: Settings) -> None:
    """Refuse a file that holds no questions."""
    questions(settings)


@cache
def questions(settings: Settings) -> tuple[Question, ...]:
    """Return the items.

    Raises:
        InputError: the file is unreadable, or an item has no question, fewer than two answers, or a
            right answer that is none of them.
    """
    if settings.file:
        name = f"{NAME}.file={settings.file}"
        text = read_text(Path(settings.file), name, fix="name a JSON file")
    else:
        name = _FILE
        text = files("mellum2_megatron.evaluation").joinpath(_FILE).read_text(encoding="utf-8")
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise InputError(name, rule=f"it must be JSON ({error})", fix="correct it") from None
    if not isinstance(rows, list) or not rows or not all(map(_is_question, rows)):
        raise InputError(
            name,
            rule="it is a list of questions with two choices or more, and the place of the answer",
            fix='write [{"question": "2 + 2?", "choices": ["4", "5"], "answer": 0}]',
        )
    return tuple(
        Question(question=row["question"], choices=tuple(row["choices"]), answer=row["answer"])
        for row in rows
    )


def _is_question(row: Any) -> bool:
    if not isinstance(row, dict) or set(row) != {"question", "choices", "answer"}:
        return False
    choices, answer = row["choices"], row["answer"]
    return (
        isinstance(row["question"], str)
        and isinstance(choices, list)
        and len(choices) > 1
        and all(isinstance(choice, str) and choice for choice in choices)
        and type(answer) is int
        and 0 <= answer < len(choices)
    )


def multiple_choice(model: EvaluatedModel, settings: Settings) -> Outcome:
    """Ask the questions."""
    details: list[dict[str, Any]] = []
    for item in questions(settings):
        answers = [model.encode(f" {choice}") for choice in item.choices]
        scores = [
            one.log_probability
            for one in model.score_continuations(model.encode(item.prompt), answers)
        ]
        normed = [score / len(choice) for score, choice in zip(scores, item.choices, strict=True)]
        details.append(
            {
                "question": item.question,
                "scores": scores,
                "acc": scores.index(max(scores)) == item.answer,
                "acc_norm": normed.index(max(normed)) == item.answer,
            }
        )
    return Outcome(
        figures=tuple(
            Figure.share(name, [row[name] for row in details]) for name in ("acc", "acc_norm")
        ),
        details=tuple(details),
    )


MEASURE = Measure(
    name=NAME,
    summary="the most likely of four answers",
    version=1,
    settings=Settings,
    check=check,
    run=multiple_choice,
    texts=lambda settings: [
        f"{item.prompt} {item.choices[item.answer]}" for item in questions(settings)
    ],
)
