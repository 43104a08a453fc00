"""Stage ``select``: drop near-duplicates of a source, and place every other document.

::

    select/SOURCE-HASH/buckets-NNNNN.npy   bucket of each document [n]; VALID: validation,
                                           DROPPED: a near-duplicate
    select/SOURCE-HASH/histogram.npy       training tokens of each bucket [4096]

A source whose near-duplicates are dropped phase by phase has, instead of the last::

    select/SOURCE-HASH/phase-P-NNNNN.npy   the same buckets, with what phase P drops
    select/SOURCE-HASH/histogram.npy       training tokens of each bucket [phases, 4096]

A source may have more documents than memory has room for. So they are numbered by their rank, which
is their place in the order of hashes and decides who stays; band keys go with ranks to temporary
files, a part of all keys each; and shards are read in blocks. In memory stay one part, and 4 bytes
for each document: the components, or bucket and choice in a phase.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mellum2_megatron.data.corpus.near_duplicates import (
    Components,
    NearDuplicateSettings,
    all_candidate_pairs,
    candidate_pairs,
    later_ones,
    shared_keys,
    shingles,
    verified,
)
from mellum2_megatron.data.pipeline.encoding import near_settings
from mellum2_megatron.data.pipeline.ledger import BUCKET_BITS, BUCKETS, take
from mellum2_megatron.data.pipeline.partitions import (
    Partitions,
    in_hash_order,
    number_type,
    parts_for,
)
from mellum2_megatron.data.pipeline.row_file import (
    BLOCK_ROWS,
    RowFile,
    count_rows,
    read_rows,
    row_ranges,
)
from mellum2_megatron.data.pipeline.tasks import Task

VALID, DROPPED = BUCKETS, BUCKETS + 1
"""Buckets beyond those of training: held out for validation, and dropped."""

Kept = Callable[[NDArray[np.integer]], NDArray[np.bool_]]
"""Choice of documents, by their ranks ``[n]``."""


def buckets_file(select: Path, phase: int, number: int) -> Path:
    """Return the file with the bucket of each document of a shard, given the folder of `select`.

    Args:
        select: result of stage ``select``.
        phase: number of the phase.
        number: number of the shard in its source.
    """
    own = select / f"phase-{phase}-{number:05}.npy"
    return own if own.is_file() else select / f"buckets-{number:05}.npy"


def select(task: Task, results: Path, folder: Path) -> dict[str, Any]:
    """Drop a source's near-duplicates; place every other document in a bucket or in validation."""
    settings = task.settings
    source = _Source.of(task, results)
    near = near_settings(settings)
    facts: dict[str, Any] = {}
    with TemporaryDirectory(prefix="temporary-", dir=folder) as scratch:
        ranked = None
        if near is not None and source.documents:
            ranked = _Ranked(source, near, Path(scratch))
        if ranked is None:
            totals = _save(folder, "buckets", source, None, _everything)
            histogram = totals.kept_tokens[:BUCKETS]
        elif "phases" not in settings:
            totals = _save(folder, "buckets", source, ranked, ranked.components().survive)
            histogram = totals.kept_tokens[:BUCKETS]
        else:
            kept = np.zeros(source.documents, dtype=bool)
            rows, facts["phases"] = [], []
            for chosen, tokens, counts in _phases(settings, source, ranked, folder):
                kept |= chosen
                rows.append(tokens)
                facts["phases"].append(counts)
            totals = _save(folder, "buckets", source, ranked, kept.__getitem__)
            histogram = np.stack(rows) if rows else np.zeros((1, BUCKETS), dtype=np.int64)
    np.save(folder / "histogram.npy", histogram)
    return {
        "documents": int(totals.kept[:BUCKETS].sum()),
        # Of one pass, as the ledger counts it.
        "tokens": int(histogram.sum(axis=-1).min()),
        "valid_documents": int(totals.kept[VALID]),
        "valid_tokens": int(totals.kept_tokens[VALID]),
        "documents_read": source.documents,
        "near_duplicates": {
            "documents": int(totals.lost.sum()),
            "tokens": int(totals.lost_tokens.sum()),
        },
        **facts,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Documents that follow each other in one shard.

    Attributes:
        first: number of the first, through all shards.
        buckets: bucket of each document ``[n]``, as if none were dropped.
        lengths: tokens of each ``[n]``.
    """

    first: int
    buckets: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The shards of a source, read in blocks.

    Attributes:
        folders: their results of stage ``tokens``.
        gathered: their results of stage ``repositories``; none where no phase joins files.
        settings: settings of the task.
    """

    folders: list[Path]
    gathered: list[Path]
    settings: dict[str, Any]

    @classmethod
    def of(cls, task: Task, results: Path) -> _Source:
        """Return the source that a task reads."""
        inputs = [one.folder(results) for one in task.inputs]
        shards = len(inputs) // 2 if task.settings.get("repositories") else len(inputs)
        return cls(folders=inputs[:shards], gathered=inputs[shards:], settings=task.settings)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Number of each shard's first document, and the number of all ``[shards + 1]``."""
        counts = [count_rows(one / "hashes.npy") for one in self.folders]
        return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.starts[-1])

    def hashes(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the hashes ``[n, 16]`` of one document after the other."""
        for shard, folder in enumerate(self.folders):
            for start, end in self.ranges(shard):
                yield read_rows(folder / "hashes.npy", start, end)

    def ranges(self, shard: int) -> Iterator[tuple[int, int]]:
        """Yield the rows of each block of a shard."""
        return row_ranges(int(self.starts[shard + 1] - self.starts[shard]))

    def blocks(self, shard: int) -> Iterator[_Block]:
        """Yield the documents of a shard."""
        folder, settings = self.folders[shard], self.settings
        for start, end in self.ranges(shard):
            hashes = read_rows(folder / "hashes.npy", start, end)
            buckets = place(hashes, settings["seed"], settings["valid_share"])
            if self.gathered:
                # All training files of a repository are in one bucket.
                keys = read_rows(self.gathered[shard] / "keys.npy", start, end)
                moved = (keys > 0) & (buckets != VALID)
                buckets[moved] = (keys[moved] >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
            yield _Block(
                first=int(self.starts[shard]) + start,
                buckets=buckets,
                lengths=np.diff(read_rows(folder / "offsets.npy", start, end + 1)),
            )


class _Ranked:
    """A source's documents in the order of their hashes, and their near-duplicates.

    Args:
        source: the source.
        near: what is a near-duplicate.
        scratch: folder for temporary files.
    """

    def __init__(self, source: _Source, near: NearDuplicateSettings, scratch: Path) -> None:
        self._source, self._near, self._scratch = source, near, scratch
        self._number = number_type(source.documents)
        self._rank()
        self._keys = self._partition()
        self._pairs: Path | None = None
        self._shared: Partitions | None = None

    def _rank(self) -> None:
        """Write the rank of each document, and the document of each rank."""
        documents = self._source.documents
        ranks = np.empty(documents, dtype=self._number)
        begin = 0
        with (self._scratch / "order.bin").open("wb") as order:
            for found in in_hash_order(self._source.hashes(), documents, self._scratch):
                in_turn = np.ascontiguousarray(found["document"])
                ranks[in_turn] = np.arange(begin, begin + len(in_turn))
                begin += len(in_turn)
                order.write(in_turn.data)
        with (self._scratch / "ranks.bin").open("wb") as file:
            file.write(ranks.data)

    def _partition(self) -> Partitions:
        """Write every band key with the rank of its document; equal keys to one part."""
        near, source = self._near, self._source
        parts = parts_for(source.documents * near.bands)
        made = Partitions(self._scratch, "keys", [("key", "<u8"), ("rank", self._number)], parts)
        for shard, folder in enumerate(source.folders):
            for start, end in source.ranges(shard):
                keys = read_rows(folder / "keys.npy", start, end)
                ranks = self.ranks(int(source.starts[shard]) + start, end - start)
                flat = keys.ravel()
                made.add(flat % np.uint64(parts), key=flat, rank=np.repeat(ranks, near.bands))
        return made

    def ranks(self, first: int, count: int) -> NDArray[np.integer]:
        """Return the ranks of documents that follow each other ``[count]``."""
        return np.fromfile(
            self._scratch / "ranks.bin", self._number, count, offset=first * self._number.itemsize
        )

    def keys(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.integer]]]:
        """Yield band keys ``[m]`` and the ranks of their documents ``[m]``, part by part."""
        for part in range(self._keys.parts):
            records = self._keys.read(part)
            yield np.ascontiguousarray(records["key"]), np.ascontiguousarray(records["rank"])

    def components(self) -> Components:
        """Return the components of near-duplicates, by rank."""
        found = Components(self._source.documents)
        shingles_of = _Shingles(self._source, self._near, self._scratch / "order.bin").of
        for keys, ranks in self.keys():
            if not self._near.verify:
                found.join(candidate_pairs(keys, ranks))
                continue
            for pairs in all_candidate_pairs(keys, ranks):
                # A pair of one component changes nothing, alike or not.
                found.join(verified(found.apart(pairs), shingles_of, self._near))
        return found

    def later(
        self, places: Callable[[NDArray[np.integer]], NDArray[np.int64]]
    ) -> Iterator[NDArray[np.integer]]:
        """Yield ranks of documents with a near-duplicate at an earlier place.

        Args:
            places: places of documents, by their ranks.
        """
        if not self._near.verify:
            for keys, ranks in self._shared_keys():
                yield later_ones(keys, ranks, places(ranks))
            return
        for pairs in self._verified_pairs():
            one, other = pairs.T
            yield np.where(places(one) > places(other), one, other)

    def _shared_keys(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.integer]]]:
        """Yield sorted keys of several documents with their ranks, found once for all phases."""
        record = [("key", "<u8"), ("rank", self._number)]
        if self._shared is not None:
            for part in range(self._shared.parts):
                records = self._shared.read(part)
                yield records["key"], records["rank"]
            return
        made = Partitions(self._scratch, "shared", record, self._keys.parts)
        for part, rows in enumerate(self.keys()):
            keys, ranks = shared_keys(*rows)
            made.add(np.full(len(keys), part), key=keys, rank=ranks)
            yield keys, ranks
        self._shared = made

    def _verified_pairs(self) -> Iterator[NDArray[np.int64]]:
        """Yield pairs of near-duplicates ``[n, 2]``, compared once for all phases."""
        if self._pairs is None:
            self._pairs = self._scratch / "pairs.bin"
            shingles_of = _Shingles(self._source, self._near, self._scratch / "order.bin").of
            with self._pairs.open("wb") as file:
                for keys, ranks in self.keys():
                    for pairs in all_candidate_pairs(keys, ranks):
                        file.write(verified(pairs, shingles_of, self._near).tobytes())
        with self._pairs.open("rb") as file:
            while len(found := np.fromfile(file, np.int64, 2 * BLOCK_ROWS)):
                yield found.reshape(-1, 2)


class _Shingles:
    """Shingle sets of documents, read when asked for."""

    def __init__(self, source: _Source, near: NearDuplicateSettings, order: Path) -> None:
        self._source, self._near, self._order = source, near, order
        self._number = number_type(source.documents)

    def of(self, rank: int) -> NDArray[np.uint64]:
        """Return the shingles of the document of a rank."""
        offset = rank * self._number.itemsize
        (document,) = np.fromfile(self._order, self._number, 1, offset=offset)
        starts = self._source.starts
        shard = int(np.searchsorted(starts, document, side="right")) - 1
        row = int(document - starts[shard])
        folder = self._source.folders[shard]
        start, end = read_rows(folder / "offsets.npy", row, row + 2)
        ids = np.fromfile(folder / "ids.bin", "<i4", count=end - start - 1, offset=4 * start)
        return shingles(ids, self._near.shingle)


def _counts() -> NDArray[np.int64]:
    return np.zeros(BUCKETS + 1, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Totals:
    """Documents and tokens of each bucket and of validation ``[BUCKETS + 1]``, kept and lost."""

    kept: NDArray[np.int64] = field(default_factory=_counts)
    kept_tokens: NDArray[np.int64] = field(default_factory=_counts)
    lost: NDArray[np.int64] = field(default_factory=_counts)
    lost_tokens: NDArray[np.int64] = field(default_factory=_counts)

    def add(self, block: _Block, kept: NDArray[np.bool_]) -> None:
        """Count the documents of a block."""
        for chosen, documents, tokens in (
            (kept, self.kept, self.kept_tokens),
            (~kept, self.lost, self.lost_tokens),
        ):
            np.add.at(documents, block.buckets[chosen], 1)
            np.add.at(tokens, block.buckets[chosen], block.lengths[chosen])


def _everything(ranks: NDArray[np.integer]) -> NDArray[np.bool_]:
    return np.ones(len(ranks), dtype=bool)


def _save(folder: Path, name: str, source: _Source, ranked: _Ranked | None, kept: Kept) -> _Totals:
    """Write the buckets of each shard, those of dropped documents as DROPPED; return their counts.

    Args:
        folder: the result.
        name: beginning of the files' names.
        source: the source.
        ranked: ranks of its documents; None where the choice does not depend on them.
        kept: the choice.
    """
    totals = _Totals()
    for shard in range(len(source.folders)):
        with RowFile(folder / f"{name}-{shard:05}.npy", np.int64) as file:
            for block in source.blocks(shard):
                count = len(block.buckets)
                chosen = kept(
                    np.arange(count) if ranked is None else ranked.ranks(block.first, count)
                )
                totals.add(block, chosen)
                file.add(np.where(chosen, block.buckets, DROPPED))
    return totals


def _phases(
    settings: dict[str, Any], source: _Source, ranked: _Ranked, folder: Path
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.int64], dict[str, Any]]]:
    """Write the choice of each phase; yield it by rank, its training tokens by bucket, and counts.

    A phase takes buckets in order from where the one before ended. In this order the earlier of two
    near-duplicates stays, so a choice does not depend on where the phase ends. Documents of
    validation come first: a phase trains on none of their near-duplicates.
    """
    buckets = np.empty(source.documents, dtype=np.int16)
    for shard in range(len(source.folders)):
        for block in source.blocks(shard):
            buckets[ranked.ranks(block.first, len(block.buckets))] = block.buckets
    begin = (0, 0)
    for phase, needed in settings["phases"]:

        def places(ranks: NDArray[np.integer], first: int = begin[1]) -> NDArray[np.int64]:
            at = buckets[ranks].astype(np.int64)
            walk = np.where(at == VALID, -1, (at - first) % BUCKETS)
            found: NDArray[np.int64] = walk * source.documents + ranks
            return found

        kept = np.ones(source.documents, dtype=bool)
        for later in ranked.later(places):
            kept[later] = False
        totals = _save(folder, f"phase-{phase}", source, ranked, kept.__getitem__)
        tokens = totals.kept_tokens[:BUCKETS]
        # A source with too few tokens is refused later, with all of its phases.
        most = int(tokens.sum() * settings["epochs"])
        parts, _, begin = take(tokens, min(needed, most), begin)
        taken = np.zeros(BUCKETS + 1, dtype=bool)
        for part in parts:
            taken[part.first : part.last] = True
        yield (
            kept,
            tokens,
            {
                "phase": phase,
                "tokens_of_a_pass": int(tokens.sum()),
                "near_duplicates": {
                    "documents": int(totals.lost[taken].sum()),
                    "tokens": int(totals.lost_tokens[taken].sum()),
                },
            },
        )


def place(hashes: NDArray[np.uint8], seed: int, valid_share: float) -> NDArray[np.int64]:
    """Return the bucket of each document ``[n]``, a keyed function of its hash ``[n, 16]``.

    Equal text has an equal place, so a document is never in training and in validation.
    """
    words = np.ascontiguousarray(hashes).view("<u8").reshape(-1, 2)
    key = hashlib.blake2b(f"place {seed}".encode(), digest_size=16).digest()
    first, second = np.frombuffer(key, dtype="<u8").astype(np.uint64)
    # SHA-256 is uniform already; the key only makes another seed another order.
    mixed = (words[:, 0] ^ first) * (second | np.uint64(1)) ^ words[:, 1]
    buckets: NDArray[np.int64] = (mixed >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
    share = (mixed & np.uint64((1 << 52) - 1)).astype(np.float64) / (1 << 52)
    buckets[share < valid_share] = VALID
    return buckets
