"""Training samples through Redis: compact form on the way, the same item at both ends.

The streamer reads the items of the data set that file feeding would build, and ranks get equal
ones. What follows from the tokens is left out on the way: 8,192 tokens then take 34 kB, not 230.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mellum2_megatron.config import Stream
from mellum2_megatron.data.feed.blend import Blend
from mellum2_megatron.data.feed.continued_training import ContinuedTraining
from mellum2_megatron.data.feed.packed_dataset import PackedDataset
from mellum2_megatron.data.feed.redis_client import RedisReader, reader_name
from mellum2_megatron.data.feed.redis_wire import Keys
from mellum2_megatron.data.feed.redis_wire import Sample as Arrays

Item = dict[str, torch.Tensor]

_INT64 = ("tokens", "labels", "position_ids")


def pack_item(item: Item) -> Arrays:
    """Return an item's arrays in compact form; `unpack_item` gives the item back.

    Args:
        item: ``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (float32), `[s]`
            each; further tensors are taken as they are.

    Returns:
        ``tokens`` (int32); ``mask``, a bit a token; ``last``, the last label. ``labels``,
        ``position_ids`` and ``loss_mask`` only where they are not what tokens, mask and
        ``cu_seqlens_padded`` imply.
    """
    arrays = {name: tensor.numpy() for name, tensor in item.items()}
    tokens, labels, positions = (arrays.pop(name) for name in _INT64)
    loss_mask = arrays.pop("loss_mask")
    if {tokens.dtype, labels.dtype, positions.dtype} != {np.dtype(np.int64)}:
        raise ValueError(f"{tokens.dtype}, {labels.dtype}, {positions.dtype}, not int64")
    packed: dict[str, NDArray[Any]] = {"tokens": tokens.astype(np.int32)}
    counts = loss_mask != 0
    packed["mask"] = np.packbits(counts)
    if not np.array_equal(loss_mask, counts):
        packed["loss_mask"] = loss_mask
    if np.array_equal(labels, _labels(tokens, counts, labels[-1])):
        packed["last"] = labels[-1:].astype(np.int32)
    else:
        packed["labels"] = labels.astype(np.int32)
    if not np.array_equal(positions, _positions(tokens.size, arrays.get("cu_seqlens_padded"))):
        packed["position_ids"] = positions.astype(np.int32)
    return {**packed, **arrays}


def unpack_item(sample: Arrays) -> Item:
    """Return the item that `pack_item` was given."""
    rest = dict(sample)
    tokens = rest.pop("tokens").astype(np.int64)
    counts = np.unpackbits(rest.pop("mask").astype(np.uint8), count=tokens.size).astype(np.bool_)
    mask = rest.pop("loss_mask", counts).astype(np.float32)
    if "labels" in rest:
        labels = rest.pop("labels").astype(np.int64)
    else:
        labels = _labels(tokens, counts, rest.pop("last")[0])
    if "position_ids" in rest:
        positions = rest.pop("position_ids").astype(np.int64)
    else:
        positions = _positions(tokens.size, rest.get("cu_seqlens_padded"))
    arrays = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
    # Copied: arrays from the wire share memory that torch may not write.
    arrays |= {name: array.copy() for name, array in rest.items()}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _labels(tokens: NDArray[Any], counts: NDArray[np.bool_], last: Any) -> NDArray[np.int64]:
    """Return the next token at every place that counts, else 0; the last label is as given."""
    labels = np.empty(tokens.size, dtype=np.int64)
    labels[:-1] = tokens[1:]
    labels[np.flatnonzero(~counts)] = 0
    labels[-1] = last
    return labels


def _positions(length: int, bounds: NDArray[Any] | None) -> NDArray[np.int64]:
    """Return positions from the start of the sequence, or of each piece with bounds."""
    positions = np.arange(length, dtype=np.int64)
    if bounds is None:
        return positions
    rooms = np.diff(bounds)
    return np.concatenate([positions[:room] for room in rooms[rooms > 0]])


class StreamSource:
    """The samples of a data set in compact form, for `Streamer`."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Arrays:
        """Return one sample."""
        dataset = self._dataset
        # Blends and phases only rename samples.
        while not isinstance(dataset, PackedDataset):
            if isinstance(dataset, ContinuedTraining) and index >= dataset.first:
                dataset, index = dataset.dataset, index - dataset.first
            elif isinstance(dataset, Blend) and not dataset.name_sources:
                source, index = dataset.locate(index)
                dataset = dataset.datasets[source]
            else:
                return pack_item(dataset[index])
        return dataset.compact(index)


class StreamedTraining(torch.utils.data.Dataset[Item]):
    """The training samples of a run, read from Redis.

    Args:
        stream: server and limits, see `redis_run.run_stream`.
        keys: names of the keys.
        length: number of samples, counted as Megatron's sampler counts.
        rank: number of this rank; ranks and their loader workers read under names of their own.
        index_split: Megatron's ``Split.train``. Its sampler chooses the batch size by it
            (megatron/training/datasets/data_samplers.py:28, 0.19.2).
        failure: see `RedisReader`.
    """

    def __init__(
        self,
        stream: Stream,
        keys: Keys,
        length: int,
        *,
        rank: int,
        index_split: Any,
        failure: Path | None = None,
    ) -> None:
        self.index_split = index_split
        self._stream, self._keys, self._length = stream, keys, length
        self._rank, self._failure = rank, failure
        self._made: tuple[int, RedisReader] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Item:
        item: Item = self._reader()[int(index)]
        return item

    def __getitems__(self, indices: Sequence[Any]) -> list[Item]:
        """Return the samples of a micro-batch with one request; PyTorch's loader calls this."""
        return self._reader().__getitems__([int(index) for index in indices])

    def _reader(self) -> RedisReader:
        # A loader worker, forked or spawned, reads under its own name.
        if self._made is None or self._made[0] != os.getpid():
            worker = torch.utils.data.get_worker_info()
            name = reader_name(
                f"rank{self._rank}", "main" if worker is None else f"worker{worker.id}"
            )
            reader = RedisReader(
                self._stream,
                self._keys,
                self._length,
                name=name,
                finish=unpack_item,
                failure=self._failure,
            )
            self._made = os.getpid(), reader
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the reader out: a spawned loader worker makes its own."""
        return {**self.__dict__, "_made": None}
