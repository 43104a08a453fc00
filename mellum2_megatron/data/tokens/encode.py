"""Documents to token arrays in worker processes; the result is the same for any number of them.

Workers are spawned, not forked: a forked tokenizer may deadlock on its thread pool. They import
neither torch nor megatron.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.data.corpus.discovery import Document, read_document
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BATCH_BYTES = 512 * 1024
# Per worker: enough to keep it busy, few enough to bound memory.
_BATCHES_IN_FLIGHT = 4

# Set once in each process: sending the tokenizer with every batch would cost more than encoding.
_tokenizer: Tokenizer | None = None
_eos = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Token ids of consecutive documents, each ending with eos.

    Attributes:
        tokens: ids of all documents, one after the other.
        lengths: tokens of each document, eos included.
        size: bytes of the texts in UTF-8.
    """

    tokens: npt.NDArray[np.int32]
    lengths: list[int]
    size: int


def encode_documents(
    documents: Sequence[Document], tokenizer_folder: Path, *, eos: int, workers: int
) -> Iterator[EncodedBatch]:
    """Encode documents in order.

    Args:
        documents: references to the documents.
        tokenizer_folder: Hugging Face tokenizer folder.
        eos: id that ends each document.
        workers: number of processes; 1 encodes in this process.

    Raises:
        WorkError: a file changed or vanished since it was selected, or a worker was killed.
    """
    batches = _batches(documents)
    if workers == 1:
        _initialise(str(tokenizer_folder), eos)
        yield from map(_encode, batches)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_initialise_worker,
        initargs=(str(tokenizer_folder), eos),
    ) as pool:
        pending: deque[Future[EncodedBatch]] = deque()
        try:
            for batch in batches:
                pending.append(pool.submit(_encode, batch))
                if len(pending) >= workers * _BATCHES_IN_FLIGHT:
                    # The oldest, not the first to finish: the order is part of the result.
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise WorkError(
                "a tokenizer worker was killed", fix="free memory or use fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Yield consecutive documents in lists of at least `_BATCH_BYTES`; the last may be smaller."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _initialise(folder: str, eos: int) -> None:
    global _tokenizer, _eos
    _tokenizer, _eos = load_tokenizer(Path(folder)), eos


def _initialise_worker(folder: str, eos: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _initialise(folder, eos)


def _encode(documents: list[Document]) -> EncodedBatch:
    assert _tokenizer is not None
    encodings = _tokenizer.encode_batch_fast(
        [read_document(document) for document in documents], add_special_tokens=False
    )
    parts = [np.array([*encoding.ids, _eos], dtype=np.int32) for encoding in encodings]
    return EncodedBatch(
        tokens=np.concatenate(parts),
        lengths=[len(part) for part in parts],
        size=sum(document.size for document in documents),
    )
