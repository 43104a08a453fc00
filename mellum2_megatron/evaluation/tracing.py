"""Tracing: a value followed through assignments in a long text, at growing lengths.

::

    HERON_0 = 48213
    ..code..
    MAPLE_0 = 90117                  <- another chain
    HERON_1 = HERON_0
    ..code..
    HERON_2 = HERON_1
    ..code..
    assert HERON_2 ==                <- the question; the answer is 48213

Like RULER's variable tracking, with filler of our own: the figures are not RULER's. ``found``: the
number is the model's greedy answer. ``preferred``: it is more likely than the number of every other
chain, which the text has too; a guess is right once in ``chains`` times.
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
    scatter,
    take_lines,
)
from mellum2_megatron.evaluation.measure import Measure, Outcome
from mellum2_megatron.evaluation.model import EvaluatedModel

NAME = "tracing"
SHORTEST = 256
"""Tokens of the shortest text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the measure.

    Attributes:
        lengths: tokens of the texts; default: a sixteenth of the model's longest, and its doubles.
        items: texts of each length, default 20.
        chains: chains of assignments in a text, 2 to 12, default 4.
        hops: assignments of a name to a name in a chain, default 2.
        digits: digits of a number, default 5.
        text: files or folders of the filler; default: Python's standard library.
        seed: seed of filler, names, numbers and places, default 1.
    """

    lengths: tuple[int, ...] = ()
    items: int = 20
    chains: int = 4
    hops: int = 2
    digits: int = 5
    text: tuple[str, ...] = ()
    seed: int = 1


def check(architecture: Mellum2Architecture, settings: Settings) -> None:
    """Check settings against a model.

    Raises:
        InputError: a number that is not positive, a length the model or the task has no room for,
            or a number of chains outside 2 to 12.
    """
    for name in ("items", "hops"):
        require_positive_int(f"{NAME}.{name}", getattr(settings, name))
    require_positive_int(f"{NAME}.digits", settings.digits, most=18)
    check_lengths(NAME, architecture, settings.lengths, SHORTEST)
    most = min(len(WORDS), 9 * 10 ** (settings.digits - 1))
    if not 2 <= settings.chains <= most:
        raise InputError(
            f"{NAME}.chains={settings.chains}", rule=f"a text has 2 to {most} chains", fix="use 4"
        )


def tracing(model: EvaluatedModel, settings: Settings) -> Outcome:
    """Measure how often values are traced, by length.

    Returns:
        For each length the shares ``found`` and ``preferred``; one detail an item.

    Raises:
        InputError: the filler is too short, or the assignments do not fit the shortest text.
    """
    return outcome_by_length(model, settings, _item, name=NAME, shortest=SHORTEST)


def _item(
    model: EvaluatedModel, settings: Settings, filler: Sequence[list[int]], length: int, item: int
) -> dict[str, Any]:
    """Ask one question, and return the outcome as plain values."""
    rng = random.Random(f"{NAME} {settings.seed} {length} {item}")
    values = numbers(rng, settings.chains, settings.digits)
    chains = [
        [f"{name}_0 = {value}\n", *(f"{name}_{n + 1} = {name}_{n}\n" for n in range(settings.hops))]
        for name, value in zip(rng.sample(WORDS, settings.chains), values, strict=True)
    ]
    last = chains[0][-1].split()[0]
    waiting, lines = [list(chain) for chain in chains], []
    while waiting:  # any order that keeps each chain's own
        chain = rng.choice(waiting)
        lines.append(model.encode(chain.pop(0)))
        waiting = [each for each in waiting if each]
    question = model.encode(f"assert {last} ==")
    answers = [model.encode(f" {value}") for value in values]
    room = length - sum(map(len, lines)) - len(question) - max(map(len, answers))
    if room < 0:
        raise InputError(
            f"{NAME}.lengths={length}",
            rule=f"the assignments alone have {length - room} tokens",
            fix=f"use longer texts, or lower {NAME}.chains or {NAME}.hops",
        )
    text = scatter(take_lines(filler, rng.randrange(len(filler)), room), lines, rng)
    prompt = [token for one in [*text, question] for token in one]
    right, *others = model.score_continuations(prompt, answers)
    return {
        "length": length,
        "name": last,
        "number": values[0],
        "found": right.is_greedy,
        "preferred": all(right.log_probability > one.log_probability for one in others),
    }


MEASURE = Measure(
    name=NAME,
    summary="a value followed through assignments in a long text, at growing lengths",
    version=1,
    settings=Settings,
    check=check,
    run=tracing,
    longest=lambda model, settings: max(lengths_of(model, settings.lengths, SHORTEST)),
)
