"""The text that `benchmarks.data` works on, and what its rows derive from it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mellum2_megatron.data.corpus.discovery import installed_sources
from mellum2_megatron.data.corpus.left_out import LeftOut
from mellum2_megatron.data.corpus.selection import read_selected, select
from mellum2_megatron.data.tokens.best_fit_packing import best_fit, cut_documents, shuffle
from mellum2_megatron.data.tokens.document_tokenizer import end_of_document
from mellum2_megatron.data.tokens.encoder import DocumentEncoder, EncoderChoice, choose_encoder
from mellum2_megatron.data.tokens.pack_files import ShardEntry
from mellum2_megatron.data.tokens.pack_writer import PieceTable, write_shard
from mellum2_megatron.data.tokens.tokenizer import train_tokenizer

LENGTH = 8192
"""Tokens of a pack."""


class Corpus:
    """Installed Python files, and what rows derive from them, each made once.

    Args:
        megabytes: size of the text.
        tokenizer: Hugging Face tokenizer folder; None: one is trained on the text.
        vocab_size: entries of the trained one.
        texts: other documents than the installed files, for tests.
    """

    def __init__(
        self,
        megabytes: float,
        tokenizer: Path | None = None,
        *,
        vocab_size: int = 8192,
        texts: Sequence[str] | None = None,
    ) -> None:
        self._megabytes, self._tokenizer, self._vocab_size = megabytes, tokenizer, vocab_size
        self._texts = texts
        self._folder = tempfile.TemporaryDirectory()

    @cached_property
    def texts(self) -> list[str]:
        """The documents: an even sample."""
        if self._texts is not None:
            return list(self._texts)
        left_out = LeftOut()
        sources, _ = installed_sources(left_out)
        selection = select(
            sources,
            seed=1,
            valid_fraction=0.1,
            max_bytes=int(self._megabytes * 1e6),
            left_out=left_out,
        )
        return [text for _, text in read_selected(selection, selection.documents)]

    @cached_property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of all installed files with their eod: bytes, times the sample's tokens a byte."""
        if self._texts is not None:
            return np.array([len(ids) + 1 for ids in self.ids])
        sources, _ = installed_sources(LeftOut())
        sizes = np.array([file.size for source in sources for file in source.files])
        tokens = sum(map(len, self.ids)) / (1e6 * self.megabytes)
        return np.maximum(sizes * tokens, 1).astype(np.int64) + 1

    @cached_property
    def megabytes(self) -> float:
        """Their bytes in UTF-8, in millions."""
        return sum(len(text.encode()) for text in self.texts) / 1e6

    @cached_property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        if self._tokenizer is not None:
            return self._tokenizer
        folder = Path(self._folder.name) / "tokenizer"
        some = self.texts if self._texts is not None else self.texts[::8]
        train_tokenizer(some, folder, vocab_size=self._vocab_size)
        return folder

    @cached_property
    def choice(self) -> EncoderChoice:
        """Library that encodes, and why."""
        return choose_encoder(self.tokenizer, end_of_document(self.tokenizer), self.texts[:100])

    def encoder(self, engine: str | None = None) -> DocumentEncoder:
        """Return an encoder, of the chosen library by default."""
        eod = end_of_document(self.tokenizer)
        return DocumentEncoder(self.tokenizer, engine or self.choice.engine, eod)

    @cached_property
    def ids(self) -> list[np.ndarray[Any, Any]]:
        """Ids of the documents."""
        return [np.asarray(ids, dtype=np.int32) for ids in self.encoder().encode(self.texts)]

    @cached_property
    def packs(self) -> ShardEntry:
        """A shard of some hundred packs of random tokens, in documents of usual lengths."""
        random = np.random.default_rng(0)
        lengths = lognormal(int(self._megabytes * 100) * LENGTH // 3500)
        pieces = cut_documents(lengths, capacity=LENGTH)
        table = PieceTable(
            tokens=random.integers(0, 98_304, int(pieces.lengths.sum()), dtype=np.int32),
            offsets=np.cumsum(pieces.lengths) - pieces.lengths,
            lengths=pieces.lengths,
            flags=np.zeros(pieces.lengths.size, dtype=np.uint8),
            sources=np.zeros(pieces.lengths.size, dtype=np.uint16),
            documents=pieces.documents.astype(np.uint64),
        )
        order = shuffle(best_fit(pieces.lengths, capacity=LENGTH), seed=1)
        prefix = Path(self._folder.name) / "shard"
        facts = write_shard(prefix, table, order, sequence_length=LENGTH, pad=0, vocab_size=98_304)
        return ShardEntry(prefix=prefix, packs=facts.packs, align=1, max_pieces=facts.max_pieces)


def lognormal(count: int) -> np.ndarray[Any, Any]:
    """Return lengths of documents in tokens, with a median of 1,480."""
    lengths = np.random.default_rng(0).lognormal(7.3, 1.4, count)
    return np.clip(lengths, 1, None).astype(np.int64)
