"""A corpus plan: sources, their filters, and the phases that train on them, read from YAML.

The report's curriculum has three phases (report §3, appendix B): web, code and mathematics at 70,
23 and 6% of 6.18T tokens, 44, 42 and 14% of 2.79T, 23, 59 and 18% of 1.69T.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.field_checks import (
    require,
    require_not_negative,
    require_positive,
    require_text,
)
from mellum2_megatron.data.corpus.near_duplicates import NearDuplicateSettings
from mellum2_megatron.data.corpus.parse_filters import CommentShare, Parses
from mellum2_megatron.data.corpus.quality_filters import (
    CODE_FILTERS,
    PROSE_FILTERS,
    UNIQUE_TOKENS,
    Filter,
    Thresholds,
)
from mellum2_megatron.data.corpus.sources import LARGEST_DOCUMENT, ReadOptions
from mellum2_megatron.data.tokens.best_fit_packing import PieceOrder
from mellum2_megatron.data.tokens.fill_in_middle import FimSettings
from mellum2_megatron.data.tokens.repository import RepositorySettings

FILTERS: Mapping[str, tuple[Filter, ...]] = MappingProxyType(
    {"code": (*CODE_FILTERS, Parses(), CommentShare()), "text": PROSE_FILTERS}
)
"""Filters of each kind of source, in order of cost."""

NEAR_DUPLICATE_SCOPES: Mapping[str, Literal["source", "phase"]] = MappingProxyType(
    {"code": "source", "text": "phase"}
)
"""Documents that each kind of source is compared with (report §3)."""

MOST_TOKENS = 10**15
"""Largest number of tokens of a phase; sums over phases and margins stay within 64 bits."""

MOST_LENGTH = 2**24
"""Largest sequence length; best-fit packing holds a table of as many entries."""

# A name is a folder of a phase, and part of the names of results.
_SOURCE_NAME = re.compile(r"\w[\w.-]{0,63}")

LARGEST_MARGIN = 0.5
"""Largest part by which more documents are packed than a phase needs."""

EPOCHS = {"code": 3.0, "text": 4.0}
"""Largest number of times a token of a source may be seen over all phases (report §3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One data set of a plan.

    Attributes:
        kind: ``code`` or ``text``. It chooses the filters, the largest number of epochs, and
            whether a phase with ``fim.code_only`` reorders its documents.
        inputs: folders and files; text files, ``.jsonl`` and parquet, also compressed.
        text_key: key of the text in rows, default: the usual names are tried.
        skip_bad_rows: count rows that cannot be used instead of refusing them, default false.
        max_document_bytes: longer documents are left out and counted, default 4 MiB. It bounds the
            memory of a worker: to parse a file takes up to a hundred times its size.
        filters: thresholds that differ from the default, by filter: ``{LineLength: {mean: 200}}``;
            null switches a filter off. Default: none differs.
        near_duplicates: drop near-duplicates inside this source, default true.
        near_duplicate_scope: ``source``: a document is compared with all others of the source.
            ``phase``: with those that the same phase takes. Default: source for code, phase for
            text.
        repository_folders: leading folders of a file's path that name its repository, where its row
            names none, default 0: it has none. 1 for a folder of clones.
        max_epochs: largest number of passes over all phases, default 3 for code, 4 for text.
    """

    kind: Literal["code", "text"]
    inputs: tuple[str, ...]
    text_key: str | None = None
    skip_bad_rows: bool = False
    max_document_bytes: int = 4 * 1024 * 1024
    filters: Mapping[str, Mapping[str, float] | None] = field(default_factory=dict)
    near_duplicates: bool = True
    near_duplicate_scope: Literal["source", "phase"] | None = None
    repository_folders: int = 0
    max_epochs: float | None = None

    def __post_init__(self) -> None:
        require(
            bool(self.inputs),
            "inputs=[]",
            rule="a source needs at least one folder or file",
            fix="name its folder",
        )
        require_positive(
            "max_document_bytes", self.max_document_bytes, most=LARGEST_DOCUMENT, fix="leave it out"
        )
        if self.max_epochs is not None:
            require_positive("max_epochs", self.max_epochs, fix="leave it out for the default")
        require(
            self.repository_folders >= 0,
            f"repository_folders={self.repository_folders}",
            rule="it must be 0 or more",
            fix="use 1 for a folder of clones",
        )
        self.chosen_filters()

    @property
    def epochs(self) -> float:
        """Largest number of passes over all phases."""
        return EPOCHS[self.kind] if self.max_epochs is None else self.max_epochs

    @property
    def compares_phases(self) -> bool:
        """Whether near-duplicates are dropped phase by phase."""
        scope = self.near_duplicate_scope or NEAR_DUPLICATE_SCOPES[self.kind]
        return self.near_duplicates and scope == "phase"

    def read_options(self) -> ReadOptions:
        """Return how the source's files are read."""
        return ReadOptions(
            text_key=self.text_key,
            skip_bad_rows=self.skip_bad_rows,
            max_document_bytes=self.max_document_bytes,
        )

    def chosen_filters(self) -> tuple[Filter, ...]:
        """Return this source's filters with its thresholds.

        Raises:
            InputError: an unknown filter or threshold, or a threshold out of range.
        """
        defaults = {type(test).__name__: test for test in FILTERS[self.kind]}
        for name in self.filters:
            if name not in defaults:
                raise InputError(
                    f"filters.{name}",
                    rule=f"sources of kind {self.kind} have no such filter",
                    fix=_filter_of_another_kind(name) or nearest(name, defaults),
                )
        chosen: list[Filter] = []
        for name, test in defaults.items():
            thresholds = self.filters.get(name, {})
            if thresholds is None:
                continue
            known = test.__dataclass_fields__  # type: ignore[attr-defined]
            for threshold in thresholds:
                if threshold not in known:
                    raise InputError(
                        f"filters.{name}.{threshold}",
                        rule="the filter has no such threshold",
                        fix=nearest(threshold, known),
                    )
            assert isinstance(test, Thresholds)
            chosen.append(replace(test, **thresholds))  # type: ignore[type-var]
        return tuple(chosen)


def _filter_of_another_kind(name: str) -> str:
    kinds = [kind for kind, tests in FILTERS.items() if name in {type(t).__name__ for t in tests}]
    return f"{name} is a filter of kind {kinds[0]}" if kinds else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of a curriculum.

    Attributes:
        tokens: tokens that the phase trains on.
        mixture: percentage of each source. They add up to 100, or to 99 to 101 when they were
            rounded, as the report's 70/23/6; shares are taken of the sum.
        fim: fill-in-the-middle settings, default none.
        repository: sources whose files are joined to repository-level documents, with their
            settings, default none: ``{code: {}}``.
        sequence_length: tokens of a pack, default 8,192.
        align: every piece begins at a multiple of it, default 1. Training on cp context-parallel
            ranks needs a multiple of 2 cp.
        packing: ``cut`` (default): a document longer than a pack is cut. ``drop``: it is left out.
        piece_order: order of the pieces in each pack: ``random`` (default), ``longest_first`` as
            best fit fills it, or ``shortest_first``. The packs, and their own order, stay the same.
        unique_tokens: unique tokens that a pack must hold, default 1% of ``sequence_length``: 82 of
            8,192 (report §3.6).
    """

    tokens: int
    mixture: Mapping[str, float]
    fim: FimSettings = field(default_factory=FimSettings)
    repository: Mapping[str, RepositorySettings] = field(default_factory=dict)
    sequence_length: int = 8192
    align: int = 1
    packing: Literal["cut", "drop"] = "cut"
    piece_order: PieceOrder = "random"
    unique_tokens: int | None = None

    def __post_init__(self) -> None:
        require_positive("tokens", self.tokens, most=MOST_TOKENS)
        require(
            2 <= self.sequence_length <= MOST_LENGTH,
            f"sequence_length={self.sequence_length}",
            rule=f"must be from 2 to {MOST_LENGTH}",
            fix="use 8192",
        )
        require(
            0 <= self.fewest_unique <= self.sequence_length,
            f"unique_tokens={self.unique_tokens}",
            rule=f"a pack of {self.sequence_length} tokens has from 0 to as many unique ones",
            fix="leave it out for 1% of sequence_length",
        )
        require(
            self.align >= 1 and self.sequence_length % self.align == 0,
            f"align={self.align}",
            rule=f"it must divide sequence_length ({self.sequence_length})",
            fix="use 1, or 2 x layout.cp",
        )
        for name, share in self.mixture.items():
            require(
                math.isfinite(share) and share > 0,
                f"mixture.{name}={share}",
                rule="a percentage is above 0",
                fix="leave the source out of the phase instead",
            )
        total = sum(self.mixture.values())
        require(
            99 <= total <= 101,
            f"mixture adds up to {total:g}",
            rule="percentages add up to 100 (99 to 101 when rounded)",
            fix="give percentages of the phase's tokens",
        )
        for name, settings in self.repository.items():
            if name not in self.mixture:
                raise InputError(
                    f"repository.{name}",
                    rule="the phase's mixture has no such source",
                    fix=nearest(name, self.mixture),
                )
            require(
                (settings.length or 0) <= self.sequence_length,
                f"repository.{name}.length={settings.length}",
                rule=f"a longer document than sequence_length ({self.sequence_length}) would be "
                "cut",
                fix="lower it, or leave it out for sequence_length",
            )

    @property
    def fewest_unique(self) -> int:
        """Unique tokens that a pack must hold."""
        if self.unique_tokens is not None:
            return self.unique_tokens
        return math.ceil(self.sequence_length / 100)

    def repository_length(self, source: str) -> int:
        """Largest number of tokens of a source's repository-level document."""
        return self.repository[source].length or self.sequence_length

    def tokens_of(self, source: str) -> int:
        """Tokens of a source in this phase."""
        share = self.mixture.get(source, 0) / sum(self.mixture.values())
        return math.ceil(self.tokens * share)

    def samples(self) -> int:
        """Sequences of the phase."""
        return -(-self.tokens // self.sequence_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A corpus plan.

    Attributes:
        name: name of the corpus.
        tokenizer: Hugging Face tokenizer folder.
        sources: data sets by name; an exact duplicate stays in the first source that has it.
        phases: phases in order of training; the first is phase 1.
        eod: token that ends every document, default ``<|endoftext|>``.
        output: folder of the results, default the plan file's name without suffix.
        seed: seed of every random choice, default 1234.
        valid_share: share of the documents of each source held out for validation, default 0.005.
        near_duplicates: shape of the near-duplicate search.
        unique_tokens: unique tokens that a document must hold, default 82 (report §3.6).
        shard_bytes: bytes of the input files that one task reads, default 64 MiB; a larger file is
            one task.
        pack_shards: shards whose documents are packed together, default 4.
        margin: part by which more documents are packed than the phase needs, default 0.01: packs
            with too few unique tokens are dropped after packing.
    """

    name: str
    tokenizer: str
    sources: Mapping[str, Source]
    phases: tuple[Phase, ...]
    eod: str | None = None
    output: str | None = None
    seed: int = 1234
    valid_share: float = 0.005
    near_duplicates: NearDuplicateSettings = field(default_factory=NearDuplicateSettings)
    unique_tokens: int = UNIQUE_TOKENS
    shard_bytes: int = 64 * 1024 * 1024
    pack_shards: int = 4
    margin: float = 0.01

    def __post_init__(self) -> None:
        require_text("name", self.name)
        for name, given in (("sources", self.sources), ("phases", self.phases)):
            require(bool(given), f"{name} is empty", rule="a plan needs one", fix=f"add to {name}")
        for name in self.sources:
            require(
                _SOURCE_NAME.fullmatch(name) is not None,
                f"sources.{name!r}",
                rule="a source's name becomes a folder: up to 64 letters, digits, _, - and ., the "
                "first a letter, digit or _",
                fix="rename the source, code-1 for example",
            )
        for number, phase in enumerate(self.phases, start=1):
            for source in phase.mixture:
                if source not in self.sources:
                    raise InputError(
                        f"phases.{number}.mixture.{source}",
                        rule="there is no such source",
                        fix=nearest(source, self.sources),
                    )
        require_not_negative("seed", self.seed, fix="leave it out for 1234")
        require_not_negative("unique_tokens", self.unique_tokens, fix="use 0 for none")
        require_positive("shard_bytes", self.shard_bytes)
        require_positive("pack_shards", self.pack_shards)
        for name, share, most in (
            ("valid_share", self.valid_share, 0.5),
            ("margin", self.margin, LARGEST_MARGIN),
        ):
            require(
                0 <= share <= most,
                f"{name}={share}",
                rule=f"it must be from 0 to {most:g}",
                fix="leave it out for the default",
            )

    def joins_repositories(self, source: str) -> bool:
        """Return true if a phase joins this source's files to repository-level documents."""
        return any(source in phase.repository for phase in self.phases)
