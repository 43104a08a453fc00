"""Small packs of random pieces, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mellum2_megatron.data.tokens.best_fit_packing import best_fit, cut_documents, shuffle
from mellum2_megatron.data.tokens.document_tokenizer import end_of_document
from mellum2_megatron.data.tokens.pack_files import PackShard, PieceFlag, ShardEntry
from mellum2_megatron.data.tokens.pack_writer import (
    PieceTable,
    ShardFacts,
    rooms,
    write_record,
    write_shard,
)
from mellum2_megatron.data.tokens.tokenizer import copy_tokenizer, tokenizer_hash, vocab_size

PAD = 2


def write_pieces(
    prefix: Path,
    documents: list[list[int]],
    *,
    length: int,
    vocabulary: int,
    align: int = 1,
    counts: list[list[bool]] | None = None,
    seed: int = 3,
) -> tuple[ShardFacts, PieceTable]:
    """Pack documents into one shard; document i has hash 1000 + i and source i modulo 2."""
    tokens = np.array([token for document in documents for token in document])
    ends = np.cumsum([len(document) for document in documents])
    pieces = cut_documents(np.diff(ends, prepend=0), capacity=length)
    total = np.diff(ends, prepend=0)[pieces.documents]
    flags = np.where(pieces.starts > 0, PieceFlag.CONTINUED, 0)
    flags |= np.where(pieces.starts + pieces.lengths < total, PieceFlag.CUT, 0)
    table = PieceTable(
        tokens=tokens,
        offsets=np.concatenate(([0], ends[:-1]))[pieces.documents] + pieces.starts,
        lengths=pieces.lengths,
        flags=flags.astype(np.uint8),
        sources=(pieces.documents % 2).astype(np.uint16),
        documents=(1000 + pieces.documents).astype(np.uint64),
        label_mask=None if counts is None else np.concatenate([np.array(row) for row in counts]),
    )
    order = shuffle(best_fit(rooms(pieces.lengths, align), capacity=length), seed=seed)
    options: dict[str, Any] = {"pad": PAD, "vocab_size": vocabulary, "align": align}
    return write_shard(prefix, table, order, sequence_length=length, **options), table


def entry_of(shard: PackShard) -> ShardEntry:
    """Describe a shard as ``packs.json`` does."""
    return ShardEntry(
        prefix=shard.prefix, packs=len(shard), align=shard.align, max_pieces=shard.max_pieces
    )


def random_documents(seed: int, *, count: int, longest: int, vocabulary: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    lengths = 1 + (random.random(count) ** 2 * longest).astype(int)
    return [random.integers(3, vocabulary, length).tolist() for length in lengths]


def write_folder(
    folder: Path,
    tokenizer: Path,
    *,
    length: int = 64,
    align: int = 1,
    splits: tuple[str, ...] = ("train", "valid"),
    shards: int = 2,
    seed: int = 0,
    count: int = 60,
) -> Path:
    """Write a folder of packs of random documents, with a tokenizer's hash and files."""
    folder.mkdir(parents=True)
    vocabulary = vocab_size(tokenizer)
    written: dict[str, list[ShardFacts]] = {}
    for number, split in enumerate(splits):
        for shard in range(shards):
            documents = random_documents(
                100 * seed + 10 * number + shard,
                count=count + 20 * shard,
                longest=2 * length,
                vocabulary=vocabulary,
            )
            facts, _ = write_pieces(
                folder / f"{split}-{shard:05}",
                documents,
                length=length,
                vocabulary=vocabulary,
                align=align,
            )
            written.setdefault(split, []).append(facts)
    copy_tokenizer(tokenizer, folder / "tokenizer")
    write_record(
        folder,
        splits=written,
        sequence_length=length,
        sources=["web", "code"],
        tokenizer_sha256=tokenizer_hash(tokenizer),
        vocab_size=vocabulary,
        eod=end_of_document(tokenizer),
    )
    return folder
