"""The curriculum's ledger: the part of each source that each phase takes, and what is missing.

A document has a fixed place in its source: one of 4,096 buckets, by a keyed hash of its text. The
phases of a plan walk through the buckets one after the other and begin again at the end, so that
every document of a source has been seen n or n + 1 times at any moment. The tokens of every bucket
are known exactly before anything is packed, hence so is every phase's part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mellum2_megatron.common.errors import InputError

BUCKET_BITS = 12
BUCKETS = 1 << BUCKET_BITS
"""Parts of a source; a phase takes whole buckets, so it may take up to 1/4,096 too much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Buckets ``first`` to ``last - 1`` of a source in one of its passes, counted from 0."""

    epoch: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Allotment:
    """One source in one phase.

    Attributes:
        phase: number of the phase, from 1.
        source: name of the source.
        needed: tokens that the phase trains on.
        taken: tokens in the parts.
        parts: buckets, in order.
        passes: passes over the source after this phase, all phases so far together.
    """

    phase: int
    source: str
    needed: int
    taken: int
    parts: tuple[Part, ...]
    passes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortage:
    """A source that has too few tokens for its largest number of passes.

    Attributes:
        source: name of the source.
        available: tokens of one pass.
        needed: tokens that all phases together train on.
        epochs: largest number of passes.
    """

    source: str
    available: int
    needed: int
    epochs: float

    @property
    def missing(self) -> int:
        """Tokens that the source lacks."""
        return self.needed - int(self.available * self.epochs)

    def error(self) -> InputError:
        """Return the refusal."""
        allowed = int(self.available * self.epochs)
        return InputError(
            f"sources.{self.source}: {self.available:,} tokens",
            rule=f"the phases need {self.needed:,}, and {self.epochs:g} passes, the most allowed, "
            f"give {allowed:,}",
            fix=f"add text of {-(-self.missing // max(int(self.epochs), 1)):,} tokens or more, "
            f"or lower its share or the phases' tokens",
        )


def with_margin(needed: int, margin: float) -> int:
    """Return the tokens to take where ``needed`` are trained on."""
    return int(needed * (1 + margin))


def take(
    tokens: NDArray[np.int64], needed: int, start: tuple[int, int]
) -> tuple[tuple[Part, ...], int, tuple[int, int]]:
    """Take buckets from ``start`` on until their tokens reach ``needed``.

    Args:
        tokens: tokens of each bucket ``[BUCKETS]``; some bucket has one.
        needed: tokens to take.
        start: epoch and bucket to begin with.

    Returns:
        Parts, their tokens, and the epoch and bucket after the last.
    """
    parts: list[Part] = []
    epoch, bucket = start
    taken = 0
    while taken < needed:
        # Whole passes are not walked through: the sum of what is left decides.
        ahead = np.cumsum(tokens[bucket:])
        last = bucket + int(np.searchsorted(ahead, needed - taken)) + 1
        last = min(last, len(tokens))
        parts.append(Part(epoch=epoch, first=bucket, last=last))
        taken += int(ahead[last - bucket - 1])
        epoch, bucket = (epoch, last) if last < len(tokens) else (epoch + 1, 0)
    return tuple(parts), taken, (epoch, bucket)


def allot(
    tokens: Mapping[str, NDArray[np.int64]],
    needed: Sequence[Mapping[str, int]],
    epochs: Mapping[str, float],
    *,
    margin: float = 0.0,
) -> tuple[list[Allotment], list[Shortage]]:
    """Give every phase its part of every source.

    Args:
        tokens: tokens of each bucket ``[BUCKETS]``, by source; ``[phases, BUCKETS]`` where
            near-duplicates are dropped phase by phase. A pass then has the tokens of the phase that
            has the fewest.
        needed: tokens of each source, phase by phase.
        epochs: largest number of passes of each source.
        margin: part taken in addition.

    Returns:
        Allotments in order of phases, and the sources that have too few tokens. Those get none.
    """
    allotments: list[Allotment] = []
    shortages: list[Shortage] = []
    for source, counts in tokens.items():
        buckets = np.broadcast_to(counts, (len(needed), counts.shape[-1]))
        used = [number for number, phase in enumerate(needed) if phase.get(source, 0)]
        available = int(buckets[used].sum(axis=1).min()) if used else int(counts.sum())
        total = sum(phase.get(source, 0) for phase in needed)
        if total > available * epochs[source]:
            shortages.append(
                Shortage(source=source, available=available, needed=total, epochs=epochs[source])
            )
            continue
        place, so_far = (0, 0), 0
        for number, phase in enumerate(needed, start=1):
            if not (wanted := phase.get(source, 0)):
                continue
            parts, taken, place = take(buckets[number - 1], with_margin(wanted, margin), place)
            so_far += taken
            allotments.append(
                Allotment(
                    phase=number,
                    source=source,
                    needed=wanted,
                    taken=taken,
                    parts=parts,
                    passes=so_far / available,
                )
            )
    return sorted(allotments, key=lambda one: one.phase), shortages
