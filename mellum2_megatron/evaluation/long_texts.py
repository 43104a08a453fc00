"""Texts of growing length: their lengths, their filler, lines put into it, and figures by length.

For measures that are like RULER's tasks (Hsieh et al. 2024, arXiv:2404.06654) with filler of our
own: their figures are not RULER's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.evaluation.measure import Figure, Outcome
from mellum2_megatron.evaluation.model import EvaluatedModel
from mellum2_megatron.evaluation.texts import notes_on, shuffled_texts

WORDS = "HERON MAPLE COBALT EMBER QUARTZ WILLOW FALCON CEDAR ONYX PRISM TUNDRA LOTUS".split()
"""Words that keys and names are made of."""


class LongTextSettings(Protocol):
    """What the settings of these measures have in common."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the texts; empty for the default, see `lengths_of`."""

    @property
    def items(self) -> int:
        """Texts of each length."""

    @property
    def text(self) -> tuple[str, ...]:
        """Files or folders of the filler; empty: Python's standard library."""

    @property
    def seed(self) -> int:
        """Seed of the filler's order."""


def outcome_by_length[S: LongTextSettings](
    model: EvaluatedModel,
    settings: S,
    ask: Callable[[EvaluatedModel, S, Sequence[list[int]], int, int], dict[str, Any]],
    *,
    name: str,
    shortest: int,
    nats: Sequence[str] = (),
) -> Outcome:
    """Ask the questions of each length.

    Args:
        model: the model.
        settings: settings of the measure.
        ask: asks one question: of the model, the settings, the filler, a length, and the item's
            number from 0. Its plain values have ``found`` and ``preferred``.
        name: the measure, for messages.
        shortest: tokens of the shortest text.
        nats: further values, whose means are figures too; default none.

    Returns:
        For each length the shares ``found`` and ``preferred`` and the means; one detail an item.

    Raises:
        InputError: the texts of the filler are too short.
    """
    lengths = lengths_of(model.architecture, settings.lengths, shortest)
    filler = filler_lines(model, name, settings.text, settings.seed, max(lengths))
    figures: list[Figure] = []
    details = []
    for length in lengths:
        items = [ask(model, settings, filler, length, item) for item in range(settings.items)]
        where = {"length": length}
        figures += [
            Figure.share(value, [item[value] for item in items], where)
            for value in ("found", "preferred")
        ]
        figures += [
            Figure.mean(value, [item[value] for item in items], "nats", where) for value in nats
        ]
        details += items
    return Outcome(figures=tuple(figures), details=tuple(details), notes=notes_on(settings.text))


def lengths_of(
    architecture: Mellum2Architecture, lengths: Sequence[int], shortest: int
) -> tuple[int, ...]:
    """Return the lengths to measure, ascending.

    Args:
        architecture: the model.
        lengths: those that were asked for; empty: a sixteenth of the model's longest context, and
            its doubles.
        shortest: tokens of the shortest text that has room for the task.
    """
    if lengths:
        return tuple(sorted(set(lengths)))
    longest = architecture.max_position_embeddings
    return tuple(longest >> shift for shift in (4, 3, 2, 1, 0) if longest >> shift >= shortest)


def check_lengths(
    name: str, architecture: Mellum2Architecture, lengths: Sequence[int], shortest: int
) -> None:
    """Refuse texts that the model or the task has no room for.

    Raises:
        InputError: a length outside ``shortest`` to the model's context, or a model whose context
            is below ``shortest``.
    """
    longest = architecture.max_position_embeddings
    for length in lengths_of(architecture, lengths, shortest) or (longest,):
        if not shortest <= length <= longest:
            raise InputError(
                f"{name}.lengths={length}",
                rule=f"a text has {shortest} to max_position_embeddings={longest} tokens",
                fix=f"use {longest} or less" if longest >= shortest else f"leave {name} out",
            )


def filler_lines(
    model: EvaluatedModel, name: str, text: Sequence[str], seed: int, longest: int
) -> list[list[int]]:
    """Return lines of code as token ids, as many as fill the longest text twice.

    Args:
        model: for its tokenizer.
        name: the measure, for messages.
        text: files or folders; empty: Python's standard library.
        seed: seed of their order.
        longest: tokens of the longest text.

    Raises:
        InputError: the texts cannot fill the longest text once.
    """
    lines: list[list[int]] = []
    count = 0
    for document in shuffled_texts(text, seed):
        for line in document.splitlines(keepends=True):
            lines.append(model.encode(line))
            count += len(lines[-1])
            if count >= 2 * longest:
                return lines
    if count < longest:
        raise InputError(
            f"{name}.lengths={longest}",
            rule=f"the texts of the filler have {count} tokens",
            fix=f"name more with {name}.text, or lower {name}.lengths",
        )
    return lines


def take_lines(filler: Sequence[list[int]], start: int, room: int) -> list[list[int]]:
    """Return whole lines from ``start`` on that fill ``room`` tokens, the end going on at 0."""
    lines: list[list[int]] = []
    while (line := filler[(start + len(lines)) % len(filler)]) and len(line) <= room:
        lines.append(line)
        room -= len(line)
    return lines


def scatter(
    lines: Sequence[list[int]], given: Sequence[list[int]], rng: random.Random
) -> list[list[int]]:
    """Return filler with given lines at random places, their order kept."""
    places = sorted(rng.randrange(len(lines) + 1) for _ in given)
    result, start = [], 0
    for place, line in zip(places, given, strict=True):
        result += [*lines[start:place], line]
        start = place
    return [*result, *lines[start:]]


def numbers(rng: random.Random, count: int, digits: int) -> list[int]:
    """Return different numbers of so many digits."""
    found: list[int] = []
    while len(found) < count:
        number = rng.randrange(10 ** (digits - 1), 10**digits)
        if number not in found:
            found.append(number)
    return found
