"""Samples to shards of packs: a shard is packed when enough tokens have come together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mellum2_megatron.data.chat.samples import Sample
from mellum2_megatron.data.tokens.best_fit_packing import best_fit, shuffle
from mellum2_megatron.data.tokens.pack_writer import PieceTable, ShardFacts, rooms, write_shard

Split = Literal["train", "valid"]


@dataclass(frozen=True, slots=True)
class _Piece:
    source: int
    conversation: int
    sample: Sample


@dataclass(slots=True)
class _Waiting:
    """Samples of a split that wait for their shard."""

    pieces: list[_Piece] = field(default_factory=list)
    tokens: int = 0
    shards: list[ShardFacts] = field(default_factory=list)


class ShardWriter:
    """Packs samples and writes shards.

    Args:
        folder: folder of the shards.
        length: tokens of a pack.
        align: every sample starts at a multiple of it.
        pad: id at padded places. It may be a token that is learnt elsewhere: padding is recorded by
            its place, never found by its id.
        vocab_size: entries of the tokenizer.
        seed: seed of the order in packs.
        shard_tokens: tokens that are packed together.
    """

    def __init__(
        self,
        folder: Path,
        *,
        length: int,
        align: int,
        pad: int,
        vocab_size: int,
        seed: int,
        shard_tokens: int,
    ) -> None:
        self._folder, self._length, self._align = folder, length, align
        self._pad, self._vocab_size, self._seed = pad, vocab_size, seed
        self._shard_tokens = shard_tokens
        self._waiting: dict[Split, _Waiting] = {"train": _Waiting(), "valid": _Waiting()}

    def add(self, split: Split, source: int, conversation: int, samples: Sequence[Sample]) -> None:
        """Add samples of a conversation; each must fit into a pack.

        Args:
            split: their split.
            source: number of their input.
            conversation: hash of the conversation.
            samples: the samples.
        """
        waiting = self._waiting[split]
        waiting.pieces += [_Piece(source, conversation, sample) for sample in samples]
        waiting.tokens += sum(sample.tokens.size for sample in samples)
        if waiting.tokens >= self._shard_tokens:
            self._write(split)

    def hold_out_one(self) -> None:
        """Move a conversation to validation if the draw gave it none: of few one may be drawn."""
        train, valid = self._waiting["train"], self._waiting["valid"]
        conversations = {piece.conversation for piece in train.pieces}
        if valid.pieces or valid.shards or train.shards or len(conversations) < 2:
            return
        chosen = min(conversations)
        valid.pieces = [piece for piece in train.pieces if piece.conversation == chosen]
        train.pieces = [piece for piece in train.pieces if piece.conversation != chosen]

    def finish(self) -> dict[str, list[ShardFacts]]:
        """Write what is left; return the shards of each split, none for one without samples."""
        for split in self._waiting:
            self._write(split)
        return {split: waiting.shards for split, waiting in self._waiting.items()}

    def _write(self, split: Split) -> None:
        waiting = self._waiting[split]
        pieces = waiting.pieces
        if not pieces:
            return
        lengths = np.array([piece.sample.tokens.size for piece in pieces], dtype=np.int64)
        table = PieceTable(
            tokens=np.concatenate([piece.sample.tokens for piece in pieces]),
            offsets=np.cumsum(lengths) - lengths,
            lengths=lengths,
            flags=np.zeros(len(pieces), dtype=np.uint8),
            sources=np.array([piece.source for piece in pieces], dtype=np.uint16),
            documents=np.array([piece.conversation for piece in pieces], dtype=np.uint64),
            label_mask=np.concatenate([piece.sample.learnt for piece in pieces]),
        )
        number = len(waiting.shards)
        # A key of its own for each shard; validation counts from the other end.
        seed = self._seed * (1 << 32) + (number if split == "train" else (1 << 32) - 1 - number)
        order = shuffle(best_fit(rooms(lengths, self._align), capacity=self._length), seed=seed)
        waiting.shards.append(
            write_shard(
                self._folder / f"{split}-{number:05}",
                table,
                order,
                sequence_length=self._length,
                pad=self._pad,
                vocab_size=self._vocab_size,
                align=self._align,
            )
        )
        waiting.pieces, waiting.tokens = [], 0
