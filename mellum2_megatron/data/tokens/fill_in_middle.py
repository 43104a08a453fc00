"""Fill in the middle (FIM): documents cut in three and reordered, so that a model learns to insert.

A document is cut at two uniform positions into prefix P, middle M and suffix S (Bavarian et al.
2022, "Efficient Training of Language Models to Fill in the Middle"). The cut is made on whole
documents, before packing (report §3). Three orders are written:

- PSM: ``<fim_prefix> P <fim_suffix> S <fim_middle> M``
- SPM ``mellum``: ``<fim_suffix> S <fim_prefix> P <fim_middle> M``. Users prompt the released base
  models in this order.
- SPM ``starcoder``: ``<fim_prefix> <fim_suffix> S <fim_middle> P M``, the order of StarCoder and of
  Megatron's ``GPTFIMDataset``.

The report does not name the cut's level. Characters are the default, because an editor asks inside
words: 69% of uniform character cuts of source code fall inside a token. Each part is encoded apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import require
from mellum2_megatron.data.tokens.keyed_random import KeyedRandom, below, happens

Ids = NDArray[np.integer]


class FimRole(IntEnum):
    """Form of a document in a pack; the values are stored in the sidecar of packs."""

    NONE = 0
    PSM = 1
    SPM = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class FimSettings:
    """Share and form of the documents that are reordered in one phase.

    Attributes:
        rate: share of the documents reordered, 0 to 1, default 0. Report §3: 0.5 of all documents
            in phase 1, 0.1 of all in phase 2, 0.5 of source code only in phase 3.
        code_only: reorder source code only, default false.
        psm_share: share of PSM among the reordered documents, default 0.5 (report §3).
        spm_order: ``mellum`` (default), as the released models are prompted, or ``starcoder``, as
            Megatron has it.
        level: cut between ``character``s (default) or between ``token``s.

    Raises:
        InputError: a share outside 0 to 1, or an unknown order or level.
    """

    rate: float = 0.0
    code_only: bool = False
    psm_share: float = 0.5
    spm_order: Literal["mellum", "starcoder"] = "mellum"
    level: Literal["character", "token"] = "character"

    def __post_init__(self) -> None:
        for name in ("rate", "psm_share"):
            share = getattr(self, name)
            require(
                0 <= share <= 1,
                f"fim.{name}={share}",
                rule="it must be a share from 0 to 1",
                fix="use 0.5",
            )
        for name, allowed in (
            ("spm_order", ("mellum", "starcoder")),
            ("level", ("character", "token")),
        ):
            value = getattr(self, name)
            require(
                value in allowed,
                f"fim.{name}={value}",
                rule=f"it must be one of {', '.join(allowed)}",
                fix=f"use {allowed[0]}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentinels:
    """Ids of the tokenizer's three FIM tokens."""

    prefix: int
    middle: int
    suffix: int

    def __post_init__(self) -> None:
        ids = (self.prefix, self.middle, self.suffix)
        if len(set(ids)) != len(ids):
            raise InputError(
                f"FIM sentinels {ids}",
                rule="prefix, middle and suffix need an id each",
                fix="use a tokenizer with three FIM tokens",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A decision about one document: its role and its two cuts, as shares of 2**64."""

    role: FimRole
    first: int = 0
    second: int = 0

    def split[Parts: (str, Ids)](self, document: Parts) -> tuple[Parts, Parts, Parts]:
        """Return prefix, middle and suffix of a text (cut on code points) or of ids ``[n]``.

        Both positions are uniform over the n + 1 gaps, so that a part may be empty.
        """
        gaps = len(document) + 1
        start, end = sorted((below(self.first, gaps), below(self.second, gaps)))
        return document[:start], document[start:end], document[end:]


def choose(settings: FimSettings, random: KeyedRandom, document: int, *, is_code: bool) -> Cut:
    """Decide about a document, given its hash.

    Four words are drawn for every document, whatever is decided. A changed rate therefore leaves
    the cuts of the documents that are reordered under both rates as they were.
    """
    reorder, order, first, second = random.words(document, 4)
    if (settings.code_only and not is_code) or not happens(reorder, settings.rate):
        return Cut(role=FimRole.NONE)
    role = FimRole.PSM if happens(order, settings.psm_share) else FimRole.SPM
    return Cut(role=role, first=first, second=second)


def join(
    parts: tuple[Ids, Ids, Ids], role: FimRole, sentinels: Sentinels, settings: FimSettings
) -> Ids:
    """Return a reordered document's ids ``[n + 3]``, given the ids of prefix, middle and suffix."""
    prefix, middle, suffix = parts
    at_prefix, at_middle, at_suffix = (
        np.array([token], dtype=prefix.dtype)
        for token in (sentinels.prefix, sentinels.middle, sentinels.suffix)
    )
    if role is FimRole.PSM:
        pieces = (at_prefix, prefix, at_suffix, suffix, at_middle, middle)
    elif settings.spm_order == "mellum":
        pieces = (at_suffix, suffix, at_prefix, prefix, at_middle, middle)
    else:
        pieces = (at_prefix, at_suffix, suffix, at_middle, prefix, middle)
    return np.concatenate(pieces)


def restore(ids: Ids, sentinels: Sentinels) -> tuple[FimRole, Ids]:
    """Return role and tokens in the text's order ``[n]`` of a document written by `join`.

    The order is read from the sentinels. Document text never holds one: the tokenizer encodes their
    spelling as ordinary characters.

    Raises:
        InputError: some of the three sentinels are there, but not in one of the three orders.
    """
    places = {
        name: np.flatnonzero(ids == getattr(sentinels, name))
        for name in ("prefix", "middle", "suffix")
    }
    if not any(len(found) for found in places.values()):
        return FimRole.NONE, ids
    if all(len(found) == 1 for found in places.values()):
        prefix, middle, suffix = (int(places[name][0]) for name in ("prefix", "middle", "suffix"))
        if 0 == prefix < suffix < middle and suffix > 1:
            before, after = ids[1:suffix], ids[suffix + 1 : middle]
            return FimRole.PSM, np.concatenate((before, ids[middle + 1 :], after))
        if 0 == suffix < prefix < middle:
            before, after = ids[prefix + 1 : middle], ids[1:prefix]
            return FimRole.SPM, np.concatenate((before, ids[middle + 1 :], after))
        if (prefix, suffix) == (0, 1) and middle > suffix:
            # PSM with an empty prefix and SPM "starcoder" begin alike, and mean the same text.
            return FimRole.SPM, np.concatenate((ids[middle + 1 :], ids[2:middle]))
    raise InputError(
        f"FIM sentinels at { ({name: found.tolist() for name, found in places.items()}) }",
        rule="a document holds none of the three, or each once in a known order",
        fix="prepare the data again",
    )


@dataclass(kw_only=True, slots=True)
class FimCounts:
    """Realised counts of one phase.

    Attributes:
        eligible: documents that could be reordered (source code only, with ``code_only``).
        psm, spm: documents reordered.
    """

    eligible: int = 0
    psm: int = 0
    spm: int = 0

    def add(self, role: FimRole) -> None:
        """Count one eligible document."""
        self.eligible += 1
        self.psm += role is FimRole.PSM
        self.spm += role is FimRole.SPM

    def report(self, settings: FimSettings) -> dict[str, float | list[float]]:
        """Return rates beside the bounds that 99.9% of fair draws keep.

        The bounds are those of the binomial distribution in its normal approximation, half a
        document wider on either side.
        """
        reordered = self.psm + self.spm
        return {
            "eligible": self.eligible,
            "psm": self.psm,
            "spm": self.spm,
            "rate": reordered / max(self.eligible, 1),
            "rate_bounds": binomial_bounds(self.eligible, settings.rate),
            "psm_share": self.psm / max(reordered, 1),
            "psm_share_bounds": binomial_bounds(reordered, settings.psm_share),
        }


def binomial_bounds(trials: int, rate: float, *, deviations: float = 3.29) -> list[float]:
    """Return the lowest and highest share that ``trials`` draws at ``rate`` give in 99.9%."""
    if not trials:
        return [0.0, 1.0]
    room = (deviations * math.sqrt(trials * rate * (1 - rate)) + 0.5) / trials
    return [max(0.0, rate - room), min(1.0, rate + room)]
