"""Training samples from packs: whole packs, in an order that is computed and not stored."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mellum2_megatron.data.feed.order import Permutation, key_of
from mellum2_megatron.data.tokens.pack_files import PackShard, ShardEntry

Sample = dict[str, torch.Tensor]
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlace:
    """The pack of a sample.

    Attributes:
        shard: number of the shard.
        pack: number of the pack in its shard.
        epoch: number of earlier passes over all packs.
    """

    shard: int
    pack: int
    epoch: int


class PackedDataset(torch.utils.data.Dataset[Sample]):
    """Samples of packs; a sample is a pack, and every epoch holds each pack once.

    Labels never cross the end of a piece: the last label of a piece is masked, and so is padding.

    Args:
        shards: the packs; each shard is opened when a sample of it is first asked for.
        samples: number of samples; more than there are packs begin further epochs, each in an order
            of its own. None: one epoch.
        key: 64-bit key of the order, see `order.key_of`.
        index_split: Megatron's ``Split``. Its sampler chooses the batch size by it, training's or
            validation's (megatron/training/datasets/data_samplers.py:28, 0.19.2).
        document_attention: describe the documents to the attention, see `__getitem__`.
        max_pieces: length of that description, the most pieces of any pack that one batch may
            hold; by default those of `shards`.
    """

    def __init__(
        self,
        shards: Sequence[ShardEntry],
        *,
        samples: int | None,
        key: int,
        index_split: Any,
        document_attention: bool,
        max_pieces: int | None = None,
    ) -> None:
        self.shards = tuple(shards)
        self._opened: dict[int, PackShard] = {}
        self._ends = list(accumulate(shard.packs for shard in shards))
        self._samples = self._ends[-1] if samples is None else samples
        self._key = key
        self.index_split = index_split
        self.document_attention = document_attention
        self.max_pieces = max_pieces or max(shard.max_pieces for shard in shards)
        self._order: tuple[int, Permutation] | None = None
        self._counting = np.arange(0)

    def __len__(self) -> int:
        return self._samples

    def place(self, sample: int) -> PackPlace:
        """Return the pack of a sample."""
        epoch, index = divmod(sample, self._ends[-1])
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Permutation(self._ends[-1], key_of(self._key, epoch))
        number = self._order[1](index)
        shard = bisect_right(self._ends, number)
        return PackPlace(
            shard=shard, pack=number - self._ends[shard] + self.shards[shard].packs, epoch=epoch
        )

    def shard(self, number: int) -> PackShard:
        """Return a shard, opened once."""
        if number not in self._opened:
            self._opened[number] = PackShard(self.shards[number].prefix)
        return self._opened[number]

    def label_documents(self, sample: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return where the pieces of a sample start, the first at 0, and their documents."""
        place = self.place(sample)
        pieces = self.shard(place.shard).pieces(place.pack)
        return pieces.starts.astype(np.int64), pieces.documents.astype(np.uint64)

    def __getitem__(self, index: Any) -> Sample:
        """Return a sample.

        Returns:
            ``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (float32), `[s]`
            each. With `document_attention` also ``cu_seqlens`` and ``cu_seqlens_padded`` (int32,
            `[max_pieces + 1]`): where pieces would begin without padding, and where they begin.
            Unused entries repeat the last one. Positions then count from the start of each piece.
        """
        stored, uncounted, described = self._parts(int(index))
        # One array, hence one allocation; its rows become the tensors.
        numbers = np.empty((3, stored.size), dtype=np.int64)
        tokens, labels, positions = numbers
        tokens[:] = stored
        labels[:-1] = tokens[1:]
        labels[uncounted] = 0
        counts = np.ones(stored.size, dtype=np.float32)
        counts[uncounted] = 0
        if self._counting.size != stored.size:
            self._counting = np.arange(stored.size)
        rows = torch.from_numpy(numbers)
        sample = {
            "tokens": rows[0],
            "labels": rows[1],
            "loss_mask": torch.from_numpy(counts),
        }
        if described is None:
            positions[:] = self._counting
        else:
            starts = described[1].astype(np.int64)
            began = np.repeat(starts[:-1], starts[1:] - starts[:-1])
            np.subtract(self._counting, began, out=positions)
            bounds = torch.from_numpy(described)
            sample["cu_seqlens"], sample["cu_seqlens_padded"] = bounds[0], bounds[1]
        sample["position_ids"] = rows[2]
        return sample

    def compact(self, index: int) -> dict[str, Array]:
        """Return a sample as `streamed_training.pack_item` makes it of the item."""
        stored, uncounted, described = self._parts(index)
        bounds = (
            {}
            if described is None
            else {"cu_seqlens": described[0], "cu_seqlens_padded": described[1]}
        )
        counts = np.ones(stored.size, dtype=np.bool_)
        counts[uncounted] = False
        return {
            "tokens": stored.astype(np.int32, copy=False),
            "mask": np.packbits(counts),
            # The last label of a pack never counts.
            "last": np.zeros(1, dtype=np.int32),
            **bounds,
        }

    def _parts(
        self, index: int
    ) -> tuple[Array, npt.NDArray[np.integer], npt.NDArray[np.int32] | None]:
        """Return tokens as stored, places of labels that do not count, and bounds of documents.

        The bounds are those without and those with padding, `[2, max_pieces + 1]`.
        """
        place = self.place(index)
        shard = self.shard(place.shard)
        tokens, uncounted = shard.tokens(place.pack), shard.uncounted_labels(place.pack)
        if not self.document_attention:
            return tokens, uncounted, None
        starts, lengths = shard.bounds(place.pack)
        count = starts.size
        described = np.empty((2, self.max_pieces + 1), dtype=np.int32)
        real, padded = described
        real[0] = 0
        np.add.accumulate(lengths, dtype=np.int32, out=real[1 : count + 1])
        real[count + 1 :] = real[count]
        # Padding belongs to the room of the piece before it.
        padded[:count] = starts
        padded[count:] = tokens.size
        return tokens, uncounted, described
