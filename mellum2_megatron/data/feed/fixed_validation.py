"""The same validation samples at every validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mellum2_megatron.data.feed.blend import Blend

if TYPE_CHECKING:
    from mellum2_megatron.data.feed.indexed_documents import IndexedDocuments
    from mellum2_megatron.data.feed.packed_dataset import PackedDataset


class FixedValidation(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A validation set that starts over after `period` samples, and numbers them.

    Megatron's sampler moves on: each validation of a run reads the next samples
    (megatron/training/training.py:4553, 0.19.2). Two validation losses would then differ by their
    data as much as by the model.

    Args:
        dataset: validation samples, at least `period` of them.
        period: number of samples of one validation.
        length: number of samples of all validations of the run.
    """

    def __init__(
        self, dataset: IndexedDocuments | PackedDataset | Blend, *, period: int, length: int
    ) -> None:
        self.dataset = dataset
        self.period = period
        self.length = length
        # Megatron's sampler chooses the batch size by it, training's or validation's
        # (megatron/training/datasets/data_samplers.py:28, 0.19.2).
        self.index_split = dataset.index_split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        number = int(index) % self.period
        sample: dict[str, torch.Tensor] = self.dataset[number]
        return {**sample, "sample": torch.tensor(number)}

    def documents(self, sample: int) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return the documents of a sample's labels.

        Args:
            sample: number of a sample, which each carries as ``sample``.

        Returns:
            Number of its source, first place of each document in the sample, rising from 0, and
            the documents.
        """
        dataset, source = self.dataset, 0
        if isinstance(dataset, Blend):
            source, sample = dataset.locate(sample)
            dataset = dataset.datasets[source]
        return source, *dataset.label_documents(sample)
