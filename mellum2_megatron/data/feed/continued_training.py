"""Training set of a phase with its own data, which starts in the middle of the sample count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset


class ContinuedTraining(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A training set whose first sample has the number `first`.

    Megatron's sampler numbers the samples of the whole training and asks for them by that number
    (megatron/training/training.py:4569, 0.19.2). A phase with its own data starts in the middle of
    that count, but at the beginning of its data.

    Args:
        dataset: the phase's samples.
        first: number of samples of the earlier phases.

    Raises:
        IndexError: on access to a sample below `first`, which belongs to an earlier phase.
    """

    def __init__(self, dataset: GPTDataset, *, first: int) -> None:
        self.dataset = dataset
        self.first = first
        # Megatron's sampler chooses the batch size by it, training's or validation's
        # (megatron/training/datasets/data_samplers.py:28, 0.19.2).
        self.index_split = dataset.index_split

    def __len__(self) -> int:
        return self.first + len(self.dataset)

    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        if int(index) < self.first:
            raise IndexError(f"sample {index}, the data begin at {self.first}")
        sample: dict[str, torch.Tensor] = self.dataset[int(index) - self.first]
        return sample
