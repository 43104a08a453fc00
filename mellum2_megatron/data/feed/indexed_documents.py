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

_ARRAYS = ("document_index.npy", "sample_index.npy", "shuffle_index.npy")
# Last the one without which Megatron loads nothing.
_FILES = (*_ARRAYS, "description.txt")

Indices = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


class IndexedDocuments(GPTDataset):
    """Samples of consecutive tokens of shuffled documents; arguments as of `GPTDataset`."""

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

    def _build_document_sample_shuffle_indices(self) -> Indices:
        builds = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        cache = Path(self.config.path_to_cache)
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        if builds:
            remove_leftovers(cache)
        if builds and not all(_is_complete(cache / f"{base}-{name}") for name in _FILES):
            shared = self.config
            # The datasets of a run share one configuration, and other threads read it.
            self.config = copy.copy(shared)
            with staging(cache / base) as folder:
                self.config.path_to_cache = str(folder)
                try:
                    super()._build_document_sample_shuffle_indices()
                finally:
                    self.config = shared
                for name in _FILES:
                    _publish(folder / f"{base}-{name}", cache / f"{base}-{name}")
        loaded: Indices = super()._build_document_sample_shuffle_indices()
        return loaded


def _is_complete(file: Path) -> bool:
    """Return true if a file exists and, for an array, has the length that its header states."""
    if file.suffix != ".npy":
        return file.is_file()
    try:
        # Mapping a file compares its length with its header, and reads none of the data.
        np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True


def _publish(staged: Path, target: Path) -> None:
    """Give a complete file its name, unless a complete one has it already."""
    with staged.open("rb") as stream:
        os.fsync(stream.fileno())  # a name must not outlive its content in a power loss
    try:
        # Unlike a rename it never takes the file from under a run that has it mapped.
        os.link(staged, target)
    except FileExistsError:
        if not _is_complete(target):
            os.replace(staged, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        os.replace(staged, target)  # a file system without hard links
