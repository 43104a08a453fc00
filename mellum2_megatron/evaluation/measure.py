"""A measure, and what it returns: figures with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.evaluation.model import EvaluatedModel

_NORMAL = 1.96
"""Standard errors on either side of a 95% interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number of a measure.

    Attributes:
        name: quantity, such as ``loss``.
        value: its mean over the items.
        unit: ``nats a token``, ``share`` and the like.
        items: number of independent items (documents, questions).
        low, high: 95% interval over the items; None (default): too few of them.
        where: what the number is for, such as ``{"length": 4096}``; default: the whole measure.
    """

    name: str
    value: float
    unit: str
    items: int
    low: float | None = None
    high: float | None = None
    where: Mapping[str, int | float | str] = field(default_factory=dict)

    @classmethod
    def mean(
        cls,
        name: str,
        values: Sequence[float],
        unit: str,
        where: Mapping[str, int | float | str] | None = None,
    ) -> Figure:
        """Return the mean of independent values; the interval is normal, from two values on."""
        mean = statistics.fmean(values)
        interval: tuple[float | None, float | None] = (None, None)
        if len(values) > 1:
            error = _NORMAL * statistics.stdev(values) / math.sqrt(len(values))
            interval = mean - error, mean + error
        return cls(
            name=name,
            value=mean,
            unit=unit,
            items=len(values),
            low=interval[0],
            high=interval[1],
            where=where or {},
        )

    @classmethod
    def share(
        cls,
        name: str,
        outcomes: Sequence[bool],
        where: Mapping[str, int | float | str] | None = None,
    ) -> Figure:
        """Return the share of true outcomes, with Wilson's interval, which holds at 0 and 1 too."""
        low, high = _wilson(statistics.fmean(outcomes), len(outcomes))
        return cls(
            name=name,
            value=statistics.fmean(outcomes),
            unit="share",
            items=len(outcomes),
            low=low,
            high=high,
            where=where or {},
        )

    @classmethod
    def pooled_share(cls, name: str, counts: Sequence[tuple[int, int]]) -> Figure:
        """Return the share of successes over items that have several trials each.

        Trials of one item resemble each other, so fewer than all of them count for the interval,
        which is Wilson's: as many as would give the spread between items (Kish 1965, design
        effect).

        Args:
            name: quantity.
            counts: successes and trials of each item; at least one trial in all.
        """
        trials = sum(count for _successes, count in counts)
        share = sum(successes for successes, _count in counts) / trials
        n, spread = len(counts), sum((good - share * count) ** 2 for good, count in counts)
        effective = float(trials)
        if n > 1 and spread > 0:
            variance = n / (n - 1) * spread / trials**2
            effective = min(effective, share * (1 - share) / variance)
        low, high = _wilson(share, effective)
        return cls(name=name, value=share, unit="share", items=n, low=low, high=high)


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share of n trials; it never leaves 0 to 1."""
    z = _NORMAL
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding may put them a hair outside.
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a measure returns.

    Attributes:
        figures: the numbers, in the order of the table.
        details: one mapping of plain values for each item, for the JSON file; default none.
        notes: sentences that belong to the numbers; default none.
    """

    figures: tuple[Figure, ...]
    details: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure[S]:
    """A question asked of a model.

    Attributes:
        name: its name on the command line and in files.
        summary: the quantity, in one line.
        version: whole number; a change of what is measured raises it, so that files tell.
        settings: frozen dataclass of its settings, every field with a default; the seed among them.
        check: raises InputError for settings that do not fit a model; runs before it is loaded.
        run: the measurement. The same model and settings give the same outcome.
        texts: texts of its items as training data would hold them, for `contamination`; None
            (default): its items are made up, or its texts need not be unseen.
        longest: tokens of the longest text that the model reads at once, which decides on memory;
            None (default): short ones.
    """

    name: str
    summary: str
    version: int
    settings: type[S]
    check: Callable[[Mellum2Architecture, S], None]
    run: Callable[[EvaluatedModel, S], Outcome]
    texts: Callable[[S], Sequence[str]] | None = None
    longest: Callable[[Mellum2Architecture, S], int] | None = None
