"""Texts to token arrays in worker processes; the result is the same for any number of them.

The texts are read in this process, which is several times as fast as encoding them. Workers import
neither torch nor megatron.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mellum2_megatron.common.ordered_pool import map_in_order
from mellum2_megatron.data.tokens.encoder import DocumentEncoder, Engine

_BATCH_LENGTH = 512 * 1024

# Set once in each process: sending the tokenizer with every batch would cost more than encoding.
_encoder: DocumentEncoder | None = None
_eod = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Token ids of consecutive documents, each ending with eod.

    Attributes:
        tokens: ids of all documents, one after the other.
        lengths: tokens of each document, eod included.
    """

    tokens: npt.NDArray[np.int32]
    lengths: list[int]

    def documents(self) -> list[npt.NDArray[np.int32]]:
        """Return the ids of each document, as views."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])


def encode_texts(
    texts: Iterable[str], tokenizer_folder: Path, *, eod: int, engine: Engine, workers: int
) -> Iterator[EncodedBatch]:
    """Encode texts in order.

    Args:
        texts: the texts; they are taken as they are needed.
        tokenizer_folder: Hugging Face tokenizer folder.
        eod: id that ends each document.
        engine: library that encodes, from `choose_encoder`.
        workers: number of processes; 1 encodes in this process.

    Raises:
        WorkError: a worker was killed, or a text became a protected token.
    """
    batches = _batches(texts)
    if workers == 1:
        _initialise(tokenizer_folder, engine, eod)
        yield from map(_encode, batches)
        return
    yield from map_in_order(
        _encode,
        batches,
        workers=workers,
        initialise=_initialise_worker,
        arguments=(tokenizer_folder, engine, eod),
        worker="a tokenizer worker",
    )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield consecutive texts in lists of about `_BATCH_LENGTH` characters or one longer text."""
    batch: list[str] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= _BATCH_LENGTH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _initialise(folder: Path, engine: Engine, eod: int) -> None:
    global _encoder, _eod
    _encoder, _eod = DocumentEncoder(folder, engine, eod), eod


def _initialise_worker(folder: Path, engine: Engine, eod: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _initialise(folder, engine, eod)


def _encode(texts: list[str]) -> EncodedBatch:
    assert _encoder is not None
    parts = [np.append(ids, np.int32(_eod)) for ids in _encoder.encode(texts)]
    return EncodedBatch(tokens=np.concatenate(parts), lengths=[len(part) for part in parts])
