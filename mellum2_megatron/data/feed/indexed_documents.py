"""Megatron's GPT dataset with sample indices that are complete whenever they have their name.

Megatron writes the three index files of a dataset in place, and loads any file of that name
(megatron/core/datasets/gpt_dataset.py:557-660, 0.19.2). A killed run or a second one that starts at
the same time would leave it half a file. Here they are written into a folder of their own and get
their names when they are complete. No index file of another run is ever deleted or replaced unless
it is damaged, so any number of runs may share a cache.
"""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from mellum2_megatron.common.staging import remove_leftovers, staging
from mellum2_megatron.data.feed.index_plan import FILES, is_complete

Indices = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


class EveryDocument:
    """The numbers of all documents, as the array that Megatron asks for when it builds an index.

    As an array they would take 4 bytes a document on every rank, though a start that finds its
    index reads none of them.

    Args:
        count: number of documents.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> np.ndarray[Any, Any]:
        return np.arange(self._count, dtype=np.int32 if dtype is None else dtype)


class IndexedDocuments(GPTDataset):
    """Samples of consecutive tokens of all documents, shuffled; arguments as of `GPTDataset`."""

    config: GPTDatasetConfig

    def documents(self, sample: int) -> tuple[int, ...]:
        """Return the numbers of the documents of a sample, in order."""
        _, numbers, _ = self._query_document_sample_shuffle_indices(sample)
        return tuple(numbers.tolist())

    def label_documents(self, sample: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return where the labels of each document of a sample start, and their numbers.

        The label at place t is token t + 1: the first token of a document is predicted from the
        end of the one before it.
        """
        _, numbers, lengths = self._query_document_sample_shuffle_indices(sample)
        starts = np.maximum(np.cumsum([0, *lengths[:-1]], dtype=np.int64) - 1, 0)
        # A first document of which the sample has one token has no label in it.
        kept = np.append(np.diff(starts) > 0, True)
        return starts[kept], numbers[kept].astype(np.uint64)

    def _get_num_tokens_per_epoch(self) -> int:
        # Megatron copies the lengths first, by an array of all numbers.
        return int(np.sum(self.dataset.sequence_lengths, dtype=np.int64))

    def _build_document_sample_shuffle_indices(self) -> Indices:
        builds = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        cache = Path(self.config.path_to_cache)
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        if builds:
            remove_leftovers(cache)
        if builds and not all(is_complete(cache / f"{base}-{name}") for name in FILES):
            shared = self.config
            # The datasets of a run share one configuration, and other threads read it.
            self.config = copy.copy(shared)
            with staging(cache / base) as folder:
                self.config.path_to_cache = str(folder)
                try:
                    super()._build_document_sample_shuffle_indices()
                finally:
                    self.config = shared
                for name in FILES:
                    _publish(folder / f"{base}-{name}", cache / f"{base}-{name}")
        loaded: Indices = super()._build_document_sample_shuffle_indices()
        return loaded


def _publish(staged: Path, target: Path) -> None:
    """Give a complete file its name, unless a complete one has it already."""
    with staged.open("rb") as stream:
        os.fsync(stream.fileno())  # a name must not outlive its content in a power loss
    try:
        # Unlike a rename it never takes the file from under a run that has it mapped.
        os.link(staged, target)
    except FileExistsError:
        if not is_complete(target):
            os.replace(staged, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        os.replace(staged, target)  # a file system without hard links
