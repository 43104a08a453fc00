"""Training data that begin in the middle of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset


class ContinuedTraining(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A training set whose first sample is sample `first` of the training.

    Megatron's sampler counts the samples of the whole training and asks for them by that number
    (megatron/training/training.py:4569, 0.19.2). A phase with data of its own has drawn none of
    them before.

    Args:
        dataset: the samples from `first` on.
        first: samples that the training has seen in earlier phases.
    """

    def __init__(self, dataset: GPTDataset, *, first: int) -> None:
        self.dataset = dataset
        self.first = first
        self.index_split = dataset.index_split

    def __len__(self) -> int:
        return self.first + len(self.dataset)

    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        if int(index) < self.first:
            raise IndexError(f"sample {index}, the data begin at {self.first}")
        sample: dict[str, torch.Tensor] = self.dataset[int(index) - self.first]
        return sample
