"""A blend of datasets, in which the source of each sample is computed when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Sample = dict[str, torch.Tensor]


class Blend(torch.utils.data.Dataset[Sample]):
    """Samples of several datasets in one order.

    Args:
        datasets: the sources, each long enough.
        locate: sample -> source and the sample's number in that source.
        length: number of samples.
        name_sources: add the number of the source to each sample, as ``source``; default false.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        locate: Callable[[int], tuple[int, int]],
        length: int,
        *,
        name_sources: bool = False,
    ) -> None:
        self.datasets = tuple(datasets)
        self.locate = locate
        self.length = length
        self.name_sources = name_sources
        # Megatron's sampler chooses the batch size by it, training's or validation's
        # (megatron/training/datasets/data_samplers.py:28, 0.19.2).
        self.index_split = datasets[0].index_split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Sample:
        source, number = self.locate(int(index))
        sample: Sample = self.datasets[source][number]
        if self.name_sources:
            sample = {**sample, "source": torch.tensor(source)}
        return sample
