"""Needle retrieval: does a model find one line of a long text again, at growing lengths?

::

    ..code..
    ACCESS_CODE_HERON = 48213        <- the needle, somewhere
    ..code..
    assert ACCESS_CODE_HERON ==      <- the question; the answer is the number

Like RULER's needle tasks (Hsieh et al. 2024, arXiv:2404.06654), with filler of our own: its figures
are not RULER's. Two questions are asked, because a small model rarely gives the whole number:

- ``found``: is the number the model's greedy answer?
- ``preferred``: does the number get a higher probability than others that the text does not have?
  A guess is right once in ``choices`` times.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import require_positive_int
from mellum2_megatron.evaluation.long_texts import (
    WORDS,
    check_lengths,
    lengths_of,
    numbers,
    outcome_by_length,
    take_lines,
)
from mellum2_megatron.evaluation.measure import Measure, Outcome
from mellum2_megatron.evaluation.model import EvaluatedModel

NAME = "needle"
SHORTEST = 64
"""Tokens of the shortest text: a needle, its question, and some filler."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the measure.

    Attributes:
        lengths: tokens of the texts; default: a sixteenth of the model's longest, and its doubles.
        items: texts of each length, default 20. Their needles lie from the beginning to the end.
        choices: numbers that are compared, the right one among them, default 8.
        digits: digits of a number, default 5.
        text: files or folders of the filler; default: Python's standard library.
        seed: seed of filler, keys and numbers, default 1.
    """

    lengths: tuple[int, ...] = ()
    items: int = 20
    choices: int = 8
    digits: int = 5
    text: tuple[str, ...] = ()
    seed: int = 1


def check(architecture: Mellum2Architecture, settings: Settings) -> None:
    """Check settings against a model.

    Raises:
        InputError: a number out of range, or a text longer than the model's context.
    """
    require_positive_int(f"{NAME}.items", settings.items)
    require_positive_int(f"{NAME}.choices", settings.choices)
    require_positive_int(f"{NAME}.digits", settings.digits, most=18)
    check_lengths(NAME, architecture, settings.lengths, SHORTEST)
    if not 2 <= settings.choices <= 9 * 10 ** (settings.digits - 1):
        raise InputError(
            f"{NAME}.choices={settings.choices}",
            rule="at least two different numbers are compared",
            fix="use 8, with 5 digits",
        )


def needle(model: EvaluatedModel, settings: Settings) -> Outcome:
    """Measure how often needles are found and preferred, by length.

    Returns:
        For each length the shares ``found`` and ``preferred``, and ``answer``: the mean
        log-probability of the right number in nats. One detail an item.

    Raises:
        InputError: the texts are too short to fill the longest length.
    """
    return outcome_by_length(model, settings, _item, name=NAME, shortest=SHORTEST, nats=("answer",))


def _item(
    model: EvaluatedModel, settings: Settings, filler: Sequence[list[int]], length: int, item: int
) -> dict[str, Any]:
    """Ask one question, and return the outcome as plain values."""
    # Of its own numbers alone, so that a longer list of lengths or items leaves it as it is.
    rng = random.Random(f"{settings.seed} {length} {item}")
    key = rng.choice(WORDS)
    values = numbers(rng, settings.choices, settings.digits)
    answers = [model.encode(f" {value}") for value in values]
    line = model.encode(f"ACCESS_CODE_{key} = {values[0]}\n")
    question = model.encode(f"assert ACCESS_CODE_{key} ==")
    room = length - len(line) - len(question) - max(map(len, answers))
    lines = take_lines(filler, rng.randrange(len(filler)), room)
    depth = item / max(1, settings.items - 1)
    lines.insert(round(depth * len(lines)), line)
    prompt = [token for one in [*lines, question] for token in one]
    right, *wrong = model.score_continuations(prompt, answers)
    return {
        "length": length,
        "depth": depth,
        "key": key,
        "number": values[0],
        "found": right.is_greedy,
        "preferred": all(right.log_probability > other.log_probability for other in wrong),
        "answer": right.log_probability,
    }


MEASURE = Measure(
    name=NAME,
    summary="one line of a long text found again, at growing lengths",
    version=1,
    settings=Settings,
    check=check,
    run=needle,
    longest=lambda model, settings: max(lengths_of(model, settings.lengths, SHORTEST)),
)
