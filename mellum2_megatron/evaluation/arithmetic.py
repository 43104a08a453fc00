"""Arithmetic: sums and differences after a few solved ones.

Each question is asked twice, because a small model rarely writes the whole number: ``found`` is the
share of greedy answers that are right, ``preferred`` the share where the right number is more
likely than three wrong ones near it. A guess is preferred once in four times.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import require_positive_int
from mellum2_megatron.evaluation.measure import Figure, Measure, Outcome
from mellum2_megatron.evaluation.model import EvaluatedModel

NAME = "arithmetic"
_WRONG = (1, -1, 10, -10)
"""Distances of the wrong answers; of four, those three that stay above zero come first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the measure.

    Attributes:
        items: questions, default 60; sums and differences in turn.
        digits: digits of both numbers, default 2.
        shots: solved questions in front, default 4.
        seed: seed of the numbers, default 1.
    """

    items: int = 60
    digits: int = 2
    shots: int = 4
    seed: int = 1


def check(_architecture: Mellum2Architecture, settings: Settings) -> None:
    """Refuse settings out of range.

    Raises:
        InputError: items, digits or shots are none.
    """
    require_positive_int(f"{NAME}.items", settings.items)
    require_positive_int(f"{NAME}.digits", settings.digits, most=9)
    if not 0 <= settings.shots <= 100:
        raise InputError(f"{NAME}.shots={settings.shots}", rule="it must be 0 to 100", fix="use 4")


def arithmetic(model: EvaluatedModel, settings: Settings) -> Outcome:
    """Ask the questions."""
    details = [_ask(model, settings, item) for item in range(settings.items)]
    figures = []
    for sign in "+-":
        rows = [row for row in details if row["sign"] == sign]
        for name in ("found", "preferred"):
            if rows:
                figures.append(Figure.share(name, [row[name] for row in rows], {"sign": sign}))
    return Outcome(figures=tuple(figures), details=tuple(details))


def _ask(model: EvaluatedModel, settings: Settings, item: int) -> dict[str, Any]:
    # Of its own numbers alone, so that more items leave it as it is.
    rng = random.Random(f"{settings.seed} {item}")
    sign = "+-"[item % 2]
    lines = []
    for _ in range(settings.shots + 1):
        low, high = 10 ** (settings.digits - 1), 10**settings.digits - 1
        first, second = sorted((rng.randint(low, high), rng.randint(low, high)), reverse=True)
        result = first + second if sign == "+" else first - second
        lines.append((f"{first} {sign} {second} =", result))
    *shots, (question, result) = lines
    prompt = "".join(f"{text} {answer}\n" for text, answer in shots) + question
    wrong = [result + distance for distance in _WRONG if result + distance >= 0][:3]
    answers = [model.encode(f" {number}") for number in (result, *wrong)]
    right, *others = model.score_continuations(model.encode(prompt), answers)
    return {
        "sign": sign,
        "question": question,
        "result": result,
        "found": right.is_greedy,
        "preferred": all(right.log_probability > other.log_probability for other in others),
    }


MEASURE = Measure(
    name=NAME,
    summary="sums and differences after solved ones",
    version=1,
    settings=Settings,
    check=check,
    run=arithmetic,
)
