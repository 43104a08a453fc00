"""The same validation samples at every validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset


class FixedValidation(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A validation set that starts over after `period` samples.

    Megatron's sampler moves on: each validation of a run reads the next samples
    (megatron/training/training.py:4553, 0.19.2), so two losses differ by the data as much as by the
    model.

    Args:
        dataset: at least `period` samples.
        period: samples of one validation.
        length: samples of all validations of the run.
    """

    def __init__(self, dataset: GPTDataset, *, period: int, length: int) -> None:
        self.dataset = dataset
        self.period = period
        self.length = length
        self.index_split = (
            dataset.index_split
        )  # by which Megatron takes the validation's own batch size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = self.dataset[int(index) % self.period]
        return sample
