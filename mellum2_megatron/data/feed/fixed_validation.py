"""The same validation samples at every validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset


class FixedValidation(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A validation set that starts over after `period` samples.

    Megatron's sampler moves on: each validation of a run reads the next samples
    (megatron/training/training.py:4553, 0.19.2). Two validation losses would then differ by their
    data as much as by the model.

    Args:
        dataset: validation samples, at least `period` of them.
        period: number of samples of one validation.
        length: number of samples of all validations of the run.
    """

    def __init__(self, dataset: GPTDataset, *, period: int, length: int) -> None:
        self.dataset = dataset
        self.period = period
        self.length = length
        # Megatron's sampler chooses the batch size by it, training's or validation's
        # (megatron/training/datasets/data_samplers.py:28, 0.19.2).
        self.index_split = dataset.index_split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = self.dataset[int(index) % self.period]
        return sample
