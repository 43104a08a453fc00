"""Stage ``packs``: a part of a source with FIM applied, packed to one sequence length.

::

    packs/LABEL-HASH/SPLIT-NNNNN.{bin,idx,pieces}   see `data.tokens.pack_files`
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mellum2_megatron.common.values import from_mapping
from mellum2_megatron.data.corpus.quality_filters import too_few_unique
from mellum2_megatron.data.pipeline.documents import Row, batches, stored_documents
from mellum2_megatron.data.pipeline.encoding import make_encoder
from mellum2_megatron.data.pipeline.ledger import Part
from mellum2_megatron.data.pipeline.row_file import count_rows, read_rows, row_ranges
from mellum2_megatron.data.pipeline.selecting import buckets_file
from mellum2_megatron.data.pipeline.tasks import Task
from mellum2_megatron.data.tokens.best_fit_packing import (
    PackOrder,
    PieceOrder,
    best_fit,
    cut_documents,
    shuffle,
)
from mellum2_megatron.data.tokens.encoder import DocumentEncoder
from mellum2_megatron.data.tokens.fill_in_middle import (
    Cut,
    FimCounts,
    FimRole,
    FimSettings,
    Sentinels,
    choose,
    join,
)
from mellum2_megatron.data.tokens.keyed_random import KeyedRandom, happens
from mellum2_megatron.data.tokens.pack_files import PieceFlag
from mellum2_megatron.data.tokens.pack_writer import PieceTable, rooms, write_shard

MOST_TOKENS = 1 << 26
"""Tokens that are packed together: 256 MB, and enough that packs are full to 99.99%."""

_RANK: dict[PieceOrder, Callable[[NDArray[np.int64]], NDArray[np.int64] | None]] = {
    "random": lambda lengths: None,
    "longest_first": lambda lengths: -lengths,
    "shortest_first": lambda lengths: lengths,
}
"""Lengths of pieces -> the numbers by which those of a pack are sorted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedDocument:
    """A document that goes into packs.

    Attributes:
        ids: its ids; the last is eod.
        flags: `PieceFlag`s of all its pieces.
        digest: hash of its text.
    """

    ids: NDArray[np.int32]
    flags: int
    digest: int


class _Gathered:
    """Documents that wait to be packed.

    Their ids are put one behind the other at once; joining them in the end would take their memory
    twice.
    """

    def __init__(self) -> None:
        # Pages that are never written take no memory.
        self._ids = np.empty(MOST_TOKENS, dtype=np.int32)
        self.size = 0
        self.lengths, self.flags, self.digests = array("q"), array("B"), array("Q")

    def add(self, document: PackedDocument) -> None:
        """Add a document."""
        end = self.size + len(document.ids)
        if end > len(self._ids):
            self._ids.resize(end, refcheck=False)
        self._ids[self.size : end] = document.ids
        self.size = end
        self.lengths.append(len(document.ids))
        self.flags.append(document.flags)
        self.digests.append(document.digest % 2**64)

    @property
    def ids(self) -> NDArray[np.int32]:
        """Ids of all documents, `[size]`."""
        return self._ids[: self.size]


@dataclass(slots=True)
class _Totals:
    """Counts of the task."""

    documents: int = 0
    tokens: int = 0
    cut: int = 0
    too_long: int = 0
    few_unique: int = 0
    example: str = ""
    shards: list[dict[str, Any]] = field(default_factory=list)


def pack(task: Task, results: Path, folder: Path) -> dict[str, Any]:
    """Write the packs of one part of a source."""
    fim = from_mapping(FimSettings, task.settings["fim"], document="corpus plan")
    counts = FimCounts()
    facts = write_packs(task, folder, _documents(task, results, fim, counts))
    if fim.rate:
        facts["fim"] = counts.report(fim)
    return facts


def write_packs(task: Task, folder: Path, documents: Iterable[PackedDocument]) -> dict[str, Any]:
    """Pack documents as they come, and write them; return the counts."""
    totals, gathered = _Totals(), _Gathered()
    for document in documents:
        gathered.add(document)
        if gathered.size >= MOST_TOKENS:
            _write(task, folder, gathered, totals)
            gathered = _Gathered()
    _write(task, folder, gathered, totals)
    return {
        "documents": totals.documents,
        "tokens": totals.tokens,
        "packs": sum(shard["packs"] for shard in totals.shards),
        "padding": sum(shard["padding"] for shard in totals.shards),
        "documents_cut": totals.cut,
        "documents_too_long": totals.too_long,
        "packs_few_unique": totals.few_unique,
        "packs_few_unique_example": totals.example,
        "shards": totals.shards,
    }


def joined_repositories(settings: dict[str, Any], epoch: int) -> Callable[[int], bool]:
    """Return the test of a repository's key: are its files joined in this phase and pass?"""
    random = KeyedRandom(settings["seed"], "joined", settings["phase"], epoch)
    rate = settings["repository"]["rate"]
    return lambda key: happens(random.words(key, 1)[0], rate)


def _documents(
    task: Task, results: Path, fim: FimSettings, counts: FimCounts
) -> Iterator[PackedDocument]:
    """Yield the documents of the part, and count those to which FIM could have been applied.

    A shard may have any number of documents, so its rows are read in blocks.
    """
    settings = task.settings
    part = Part(**settings["part"])
    select, *rest = task.inputs
    form = _Forms.of(task, fim, counts)
    # Result of stages tokens and documents, and of repositories where the phase joins files.
    each = 3 if "repository" in settings else 2
    for number, (tokens, stored, *gathered) in zip(
        settings["shards"], batched(rest, each), strict=True
    ):
        places = buckets_file(select.folder(results), settings["phase"], number)
        # One for all blocks: each goes on where the one before has ended.
        texts = enumerate(stored_documents(stored.folder(results)))
        for start, end in row_ranges(count_rows(places)):
            buckets = read_rows(places, start, end)
            chosen = np.flatnonzero((buckets >= part.first) & (buckets < part.last))
            if gathered:
                joins = joined_repositories(settings, part.epoch)
                keys = read_rows(gathered[0].folder(results) / "keys.npy", start, end)[chosen]
                joined = [key for key in np.unique(keys[keys > 0]).tolist() if joins(key)]
                chosen = chosen[~np.isin(keys, np.array(joined, dtype=np.uint64))]
            if len(chosen):
                yield from form.block(tokens.folder(results), texts, start, end, chosen)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Forms:
    """Gives documents their FIM form.

    A document that is cut on characters is encoded anew in its three parts; all others have their
    ids from stage ``tokens``.

    Attributes:
        settings: settings of the task.
        fim: FIM settings.
        counts: counts of the documents to which FIM could have been applied.
        random: choices by hash of the text.
        eligible: whether FIM may be applied to this source.
        encoder: encoder of texts; None where none is cut on characters.
    """

    settings: dict[str, Any]
    fim: FimSettings
    counts: FimCounts
    random: KeyedRandom
    eligible: bool
    encoder: DocumentEncoder | None

    @classmethod
    def of(cls, task: Task, fim: FimSettings, counts: FimCounts) -> _Forms:
        """Return those of a task."""
        settings = task.settings
        eligible = bool(fim.rate) and (settings["is_code"] or not fim.code_only)
        return cls(
            settings=settings,
            fim=fim,
            counts=counts,
            random=KeyedRandom(
                settings["seed"], "fim", settings["phase"], settings["part"]["epoch"]
            ),
            eligible=eligible,
            encoder=make_encoder(task) if eligible and fim.level == "character" else None,
        )

    def block(
        self,
        source: Path,
        texts: Iterator[tuple[int, Row]],
        start: int,
        end: int,
        chosen: NDArray[np.int64],
    ) -> Iterator[PackedDocument]:
        """Yield documents of a block of rows.

        Args:
            source: result of stage ``tokens``.
            texts: documents of the shard behind the blocks so far, with their numbers.
            start, end: rows of the block.
            chosen: rows to yield, counted from ``start``.
        """
        offsets = read_rows(source / "offsets.npy", start, end + 1)
        hashes = read_rows(source / "hashes.npy", start, end)
        ids = np.memmap(source / "ids.bin", dtype="<i4", mode="r")
        digests = {row: int.from_bytes(hashes[row].tobytes(), "little") for row in chosen.tolist()}
        cuts: dict[int, Cut] = {}
        if self.eligible:
            is_code = self.settings["is_code"]
            drawn = (
                (row, choose(self.fim, self.random, one, is_code=is_code))
                for row, one in digests.items()
            )
            cuts = {row: cut for row, cut in drawn if cut.role}
        recoded: Iterator[NDArray[np.int32]] = iter(())
        if self.encoder is not None and cuts:
            rows = read_rows(source / "rows.npy", start, end)
            recoded = self._recode(texts, {int(rows[row]): row for row in cuts}, cuts, self.encoder)
        for row, digest in digests.items():
            whole = np.array(ids[offsets[row] : offsets[row + 1]], dtype=np.int32)
            reordered = cuts.get(row)
            role = FimRole.NONE if reordered is None else reordered.role
            if reordered is not None:
                if self.encoder is None:
                    parts = reordered.split(whole[:-1])
                    joined = join(parts, role, sentinels(self.settings), self.fim)
                    whole = np.append(joined, whole[-1:])
                else:
                    # Both go through the rows in order.
                    whole = next(recoded)
            if self.eligible:
                self.counts.add(role)
            yield PackedDocument(ids=whole, flags=int(role), digest=digest)

    def _recode(
        self,
        texts: Iterator[tuple[int, Row]],
        wanted: dict[int, int],
        cuts: dict[int, Cut],
        encoder: DocumentEncoder,
    ) -> Iterator[NDArray[np.int32]]:
        """Yield the reordered ids of documents cut on characters, in order of rows.

        Args:
            texts: see `block`.
            wanted: row in the block, by row in stage ``documents``.
            cuts: cuts of these documents by row in the block.
            encoder: encoder of texts.
        """
        marks = sentinels(self.settings)
        for batch in batches(_wanted(texts, wanted)):
            parts = [piece for row, one in batch for piece in cuts[row].split(one.text)]
            encoded = encoder.encode(parts)
            for (row, _), three in zip(batch, batched(encoded, 3), strict=True):
                prefix, middle, suffix = three
                ids = join((prefix, middle, suffix), cuts[row].role, marks, self.fim)
                yield np.append(ids, np.int32(self.settings["eod"])).astype(np.int32)


def _wanted(texts: Iterator[tuple[int, Row]], wanted: dict[int, int]) -> Iterator[tuple[int, Row]]:
    """Yield the documents of the rows in ``wanted`` with their values; read none behind them."""
    last = max(wanted)
    for number, document in texts:
        if number in wanted:
            yield wanted[number], document
        if number == last:
            return


def fim_form(
    text: str,
    ids: NDArray[np.int32],
    cut: Cut,
    encoder: DocumentEncoder,
    marks: Sentinels,
    fim: FimSettings,
) -> NDArray[np.int32]:
    """Return the ids of one reordered document, without eod, given its text and its ids."""
    if fim.level == "token":
        return join(cut.split(ids), cut.role, marks, fim).astype(np.int32)
    prefix, middle, suffix = encoder.encode(cut.split(text))
    return join((prefix, middle, suffix), cut.role, marks, fim).astype(np.int32)


def sentinels(settings: dict[str, Any]) -> Sentinels:
    """Return the FIM sentinels of a task's tokenizer."""
    special = settings["special"]
    return Sentinels(
        prefix=special["fim_prefix"], middle=special["fim_middle"], suffix=special["fim_suffix"]
    )


def _write(task: Task, folder: Path, gathered: _Gathered, totals: _Totals) -> None:
    """Pack documents and write one shard; nothing for no documents."""
    if not gathered.lengths:
        return
    settings = task.settings
    length, align = settings["sequence_length"], settings["align"]
    lengths = np.array(gathered.lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    pieces = cut_documents(lengths, capacity=length, policy=settings["packing"])
    ends = pieces.starts + pieces.lengths < lengths[pieces.documents]
    flags = np.array(gathered.flags, dtype=np.uint8)[pieces.documents]
    flags |= np.where(pieces.starts > 0, PieceFlag.CONTINUED, 0).astype(np.uint8)
    flags |= np.where(ends, PieceFlag.CUT, 0).astype(np.uint8)
    table = PieceTable(
        tokens=gathered.ids,
        offsets=starts[pieces.documents] + pieces.starts,
        lengths=pieces.lengths,
        flags=flags,
        sources=np.full(len(pieces.lengths), settings["source_number"], dtype=np.uint16),
        documents=np.array(gathered.digests, dtype=np.uint64)[pieces.documents],
    )
    name = f"{settings['split']}-{len(totals.shards):05}"
    key = hashlib.blake2b(f"{settings['seed']} {task.label} {name}".encode(), digest_size=8)
    order = shuffle(
        best_fit(rooms(table.lengths, align), capacity=length),
        seed=int.from_bytes(key.digest(), "little"),
        rank=_RANK[settings.get("piece_order", "random")](table.lengths),
    )
    order = _diverse(order, table, settings["unique_tokens"], totals, name)
    totals.documents += len(lengths) - len(pieces.dropped)
    totals.too_long += len(pieces.dropped)
    totals.cut += int((lengths > length).sum()) - len(pieces.dropped)
    if len(order.starts) == 1:
        return
    shard = write_shard(
        folder / name,
        table,
        order,
        sequence_length=length,
        pad=settings["special"].get("pad", settings["eod"]),
        vocab_size=settings["vocab_size"],
        align=align,
    )
    totals.tokens += shard.tokens
    totals.shards.append(asdict(shard))


def _diverse(
    order: PackOrder, table: PieceTable, fewest: int, totals: _Totals, name: str
) -> PackOrder:
    """Return the packs with at least ``fewest`` unique tokens (report §3.6), in the same order."""
    kept: list[NDArray[np.int64]] = []
    for pack, (start, end) in enumerate(zip(order.starts[:-1], order.starts[1:], strict=True)):
        pieces = order.pieces[start:end]
        ids = np.concatenate(
            [
                table.tokens[offset : offset + length]
                for offset, length in zip(
                    table.offsets[pieces].tolist(), table.lengths[pieces].tolist(), strict=True
                )
            ]
        )
        reason = too_few_unique(ids, fewest=fewest)
        if reason is None:
            kept.append(pieces)
        else:
            totals.few_unique += 1
            totals.example = totals.example or f"{name} before packs were dropped, {pack}: {reason}"
    sizes = [len(pieces) for pieces in kept]
    return PackOrder(
        pieces=np.concatenate([np.zeros(0, dtype=np.int64), *kept]),
        starts=np.concatenate(([0], np.cumsum(sizes))).astype(np.int64),
    )
