"""Loss by position: how well a model predicts a token that stands late in a long text.

A model that uses its context predicts later tokens better. Where the loss rises instead, the
context is longer than what the model has learnt to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import require_positive_int
from mellum2_megatron.evaluation.measure import Figure, Measure, Outcome
from mellum2_megatron.evaluation.model import EvaluatedModel
from mellum2_megatron.evaluation.texts import notes_on, shuffled_texts

if TYPE_CHECKING:
    import torch

NAME = "position_loss"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the measure.

    Attributes:
        length: tokens of each text, counted from its beginning; 0 (default): the model's longest.
        texts: number of texts, default 16. Each is one document that has ``length`` tokens.
        first_range: positions in the first range, default 64. Each later range ends at twice the
            position of the one before.
        text: files or folders of the texts; default: Python's standard library.
        seed: seed that chooses the texts, default 1.
    """

    length: int = 0
    texts: int = 16
    first_range: int = 64
    text: tuple[str, ...] = ()
    seed: int = 1


def check(architecture: Mellum2Architecture, settings: Settings) -> None:
    """Check settings against a model.

    Raises:
        InputError: a number out of range, or a text longer than the model's context.
    """
    require_positive_int(f"{NAME}.texts", settings.texts)
    require_positive_int(f"{NAME}.first_range", settings.first_range)
    longest = architecture.max_position_embeddings
    if not (settings.length == 0 or 2 <= settings.length <= longest):
        raise InputError(
            f"{NAME}.length={settings.length}",
            rule=f"a text has 2 to max_position_embeddings={longest} tokens",
            fix=f"use {longest} or less",
        )


def position_loss(model: EvaluatedModel, settings: Settings) -> Outcome:
    """Measure the loss in ranges of positions, and over all.

    Returns:
        Figures ``loss`` in nats a token, with the range as ``where`` (first and last position,
        counted from 0). Texts weigh the same; the interval is over texts. One detail a text, so
        that two models can be compared text by text.

    Raises:
        InputError: too few documents have enough tokens.
    """
    import torch

    length = settings.length or model.architecture.max_position_embeddings
    rows = _rows(model, settings, length)
    losses = torch.stack([-model.log_probabilities(row[None])[0] for row in rows])
    figures: list[Figure] = []
    details: list[dict[str, float]] = [{} for _ in rows]
    for first, last in [(1, length - 1), *ranges(length, settings.first_range)]:
        # Place t of the losses belongs to token t + 1.
        means = losses[:, first - 1 : last].double().mean(1).tolist()
        where = {"first": first, "last": last}
        figures.append(Figure.mean("loss", means, "nats a token", where))
        for detail, mean in zip(details, means, strict=True):
            detail[f"{first}..{last}"] = mean
    return Outcome(figures=tuple(figures), details=tuple(details), notes=notes_on(settings.text))


def ranges(length: int, first_range: int) -> list[tuple[int, int]]:
    """Return first and last position of each range; position 0 has no loss.

    >>> ranges(256, 64)
    [(1, 63), (64, 127), (128, 255)]
    """
    found, start, end = [], 1, first_range
    while start < length:
        if end > start:
            found.append((start, min(end, length) - 1))
        start, end = max(start, end), 2 * end
    return found


def _rows(model: EvaluatedModel, settings: Settings, length: int) -> list[torch.Tensor]:
    """Return the first ``length`` tokens of as many documents as are asked for, each `[length]`."""
    import torch

    rows: list[torch.Tensor] = []
    longest = 0
    for text in shuffled_texts(settings.text, settings.seed):
        # A token has a character at least, so that short documents need not be encoded.
        ids = model.encode(text) if len(text.encode()) >= length else []
        longest = max(longest, len(ids))
        if len(ids) >= length:
            rows.append(torch.tensor(ids[:length]))
        if len(rows) == settings.texts:
            return rows
    raise InputError(
        f"{NAME}.texts={settings.texts}",
        rule=f"{len(rows)} documents have {length} tokens"
        + (f", the longest has {longest}" if not rows and longest else ""),
        fix=f"name longer ones with {NAME}.text, or lower {NAME}.texts or {NAME}.length",
    )


MEASURE = Measure(
    name=NAME,
    summary="loss of a token by its position in a long text",
    version=1,
    settings=Settings,
    check=check,
    run=position_loss,
    longest=lambda model, settings: settings.length or model.max_position_embeddings,
)
