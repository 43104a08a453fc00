"""Aggregation: the word that a long text logs most often, at growing lengths.

::

    log("HERON")
    ..code..
    log("MAPLE")
    log("HERON")
    ..code..
    most_common = "                  <- the question; the answer is HERON"

Like RULER's common words, with one word asked for and filler of our own: the figures are not
RULER's. ``found``: the word is the model's greedy answer. ``preferred``: it is more likely, per
token, than every other word of the text; a guess is right once in ``words`` times.
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
    outcome_by_length,
    scatter,
    take_lines,
)
from mellum2_megatron.evaluation.measure import Measure, Outcome
from mellum2_megatron.evaluation.model import EvaluatedModel

NAME = "aggregation"
SHORTEST = 512
"""Tokens of the shortest text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the measure.

    Attributes:
        lengths: tokens of the texts; default: a sixteenth of the model's longest, and its doubles.
        items: texts of each length, default 20.
        words: different words in a text, 2 to 12, default 6.
        often: lines of the word that is asked for, default 8.
        seldom: lines of each other word, fewer, default 3.
        text: files or folders of the filler; default: Python's standard library.
        seed: seed of filler, words and places, default 1.
    """

    lengths: tuple[int, ...] = ()
    items: int = 20
    words: int = 6
    often: int = 8
    seldom: int = 3
    text: tuple[str, ...] = ()
    seed: int = 1


def check(architecture: Mellum2Architecture, settings: Settings) -> None:
    """Check settings against a model.

    Raises:
        InputError: a number that is not positive, a length the model or the task has no room for,
            words outside 2 to 12, or ``seldom`` not below ``often``.
    """
    for name in ("items", "often", "seldom"):
        require_positive_int(f"{NAME}.{name}", getattr(settings, name))
    check_lengths(NAME, architecture, settings.lengths, SHORTEST)
    if not 2 <= settings.words <= len(WORDS):
        raise InputError(
            f"{NAME}.words={settings.words}", rule=f"a text has 2 to {len(WORDS)}", fix="use 6"
        )
    if settings.seldom >= settings.often:
        raise InputError(
            f"{NAME}.seldom={settings.seldom}",
            rule=f"it must be below often={settings.often}",
            fix=f"use {settings.often - 1} or less" if settings.often > 1 else "raise often",
        )


def aggregation(model: EvaluatedModel, settings: Settings) -> Outcome:
    """Measure how often the most common word is known, by length.

    Returns:
        For each length the shares ``found`` and ``preferred``; one detail an item.

    Raises:
        InputError: the filler is too short, or the words do not fit the shortest text.
    """
    return outcome_by_length(model, settings, _item, name=NAME, shortest=SHORTEST)


def _item(
    model: EvaluatedModel, settings: Settings, filler: Sequence[list[int]], length: int, item: int
) -> dict[str, Any]:
    """Ask one question, and return the outcome as plain values."""
    rng = random.Random(f"{NAME} {settings.seed} {length} {item}")
    words = rng.sample(WORDS, settings.words)
    logged = [words[0]] * settings.often + words[1:] * settings.seldom
    rng.shuffle(logged)
    lines = [model.encode(f'log("{word}")\n') for word in logged]
    question = model.encode('most_common = "')
    answers = [model.encode(f'{word}"') for word in words]
    room = length - sum(map(len, lines)) - len(question) - max(map(len, answers))
    if room < 0:
        raise InputError(
            f"{NAME}.lengths={length}",
            rule=f"the words alone have {length - room} tokens",
            fix=f"use longer texts, or lower {NAME}.words or {NAME}.often",
        )
    text = scatter(take_lines(filler, rng.randrange(len(filler)), room), lines, rng)
    prompt = [token for one in [*text, question] for token in one]
    scored = model.score_continuations(prompt, answers)
    right, *others = [
        one.log_probability / len(answer) for one, answer in zip(scored, answers, strict=True)
    ]
    return {
        "length": length,
        "word": words[0],
        "found": scored[0].is_greedy,
        "preferred": all(right > other for other in others),
    }


MEASURE = Measure(
    name=NAME,
    summary="the word that a long text logs most often, at growing lengths",
    version=1,
    settings=Settings,
    check=check,
    run=aggregation,
    longest=lambda model, settings: max(lengths_of(model, settings.lengths, SHORTEST)),
)
