"""The buffers of a rank's weights and gradients, and the rank that updates each weight.

tests/planning/test_optimizer_report.py compares them with the optimizer that Megatron builds. No
torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

from mellum2_megatron.config import Backend, Layout, Run
from mellum2_megatron.planning.rank_weights import Weight, local_weights, uses_muon

_ALIGNMENT = 64
"""Alignment of a matrix's offset in the gradient buffer, in elements
(core/optimizer/param_layout.py:26, 0.19.2)."""

_FULL = 0.9
"""A bucket may close once its elements reach this fraction of ranks x its largest matrix
(core/optimizer/layer_wise_optimizer.py:322, 0.19.2)."""


def assign_owners(
    sizes: Sequence[int], ranks: int, bucket_size: int | None
) -> tuple[list[int], list[int]]:
    """Assign each matrix to the data-parallel rank that holds its state and updates it.

    Matrices go into buckets in the order of the backward pass. Inside a bucket they are taken from
    the largest on, and each goes to the rank with the fewest elements so far. Every rank holds the
    buffers of weights and gradients in full. The ranks' shares of a bucket are all as long as the
    largest (megatron/core/optimizer/layer_wise_optimizer.py:196-370, 0.19.2).

    Args:
        sizes: number of elements of each matrix, in the order of the forward pass.
        ranks: number of ranks that divide the state.
        bucket_size: number of elements at which a bucket closes; None: one bucket.

    Returns:
        Owner of each matrix, and length in elements of each bucket, in the order of the backward
        pass. The buckets make up the buffer.
    """
    owners = [0] * len(sizes)
    bucket: list[int] = []
    lengths: list[int] = []
    # A bucket's end is a multiple of lcm(ranks, 128) (core/optimizer/param_layout.py:33, 0.19.2).
    share = math.lcm(_ALIGNMENT, math.lcm(ranks, 128) // ranks)

    def close() -> None:
        loads = [0] * ranks
        for index in sorted(bucket, key=lambda index: -sizes[index]):
            owner = loads.index(min(loads))
            owners[index] = owner
            loads[owner] = _round_up(loads[owner], _ALIGNMENT) + sizes[index]
        lengths.append(ranks * _round_up(max(loads), share))
        bucket.clear()

    # The backward pass reaches the last weights first.
    largest = total = 0
    for index in reversed(range(len(sizes))):
        bucket.append(index)
        largest, total = max(largest, sizes[index]), total + sizes[index]
        if bucket_size is not None and total >= max(bucket_size, int(ranks * largest * _FULL)):
            close()
            largest = total = 0
    if bucket:
        close()
    return owners, lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class EvenBuffer:
    """Places of weights in a buffer that ranks divide element by element.

    Attributes:
        starts: first element of each weight, in the order of the forward pass.
        buckets: first element and end of each bucket, in the order of the backward pass.
    """

    starts: tuple[int, ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.buckets[-1][1] if self.buckets else 0

    def exchanged(self, sizes: Sequence[int], owners: Sequence[int], ranks: int) -> int:
        """Return the elements of all weights that lie in another rank's share than their owner's.

        Args:
            sizes, owners: number of elements and owner of each weight.
            ranks: number of ranks that divide each bucket.
        """
        moved = 0
        for start, size, owner in zip(self.starts, sizes, owners, strict=True):
            first, last = next(each for each in self.buckets if each[0] <= start < each[1])
            share = (last - first) // ranks
            own = first + owner * share
            moved += size - max(0, min(start + size, own + share) - max(start, own))
        return moved


def even_buffer(
    sizes: Sequence[int], ranks: int, bucket_size: int | None, *, alone: Container[int] = ()
) -> EvenBuffer:
    """Return the places of weights in a buffer of even shares: Adam's, and Muon's on request.

    The ranks divide it element by element. Each weight is aligned, and each bucket's end is
    a multiple of the ranks (megatron/core/optimizer/distrib_optimizer.py:506-585, 0.19.2).

    Args:
        sizes: number of elements of each weight, in the order of the forward pass.
        ranks: number of ranks that divide the state.
        bucket_size: number of elements at which a bucket closes; None: one bucket.
        alone: indices in ``sizes`` of weights with a bucket of their own, default none.
    """
    unit = math.lcm(ranks, 128)  # core/optimizer/param_layout.py:33 (0.19.2)
    starts = [0] * len(sizes)
    buckets: list[tuple[int, int]] = []
    start = end = 0  # bounds of the open bucket

    def close() -> None:
        nonlocal start, end
        end = _round_up(end, unit)
        if end > start:
            buckets.append((start, end))
        start = end

    for index in reversed(range(len(sizes))):
        end = _round_up(end, _ALIGNMENT)
        if index in alone:
            close()
        starts[index] = end
        end += sizes[index]
        if index in alone or (bucket_size is not None and end - start >= bucket_size):
            close()
    close()
    return EvenBuffer(starts=tuple(starts), buckets=tuple(buckets))


def _round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit


def bucket_size(run: Run, world_size: int, *, stage: int, chunk: int) -> int | None:
    """Return the elements at which a gradient bucket closes; None: one bucket for all weights.

    As megatron/training/training.py:1552-1568 and 1861-1868 (0.19.2).
    """
    # Megatron makes one bucket on every pipeline stage and virtual stage except the first.
    if not run.optimizer.overlap_grad_reduce or stage or chunk:
        return None
    return max(40_000_000, 1_000_000 * run.layout.data_parallel(world_size) * run.layout.cp)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ownership:
    """Division of the matrices under Muon among ranks that hold the same weights.

    Attributes:
        group: ``dense``, or ``experts`` if these have data-parallel ranks of their own.
        owned: matrices of each rank in the group.
        buckets: length in elements of each bucket of these weights, in the order of the backward
            pass, the same on every rank.
        exchanged: elements that ranks send to their owner and back in the optimizer's step, of all
            ranks together. 0 if each matrix lies in its owner's share.
    """

    group: str
    owned: tuple[tuple[Weight, ...], ...]
    buckets: tuple[int, ...]
    exchanged: int = 0

    @property
    def buffer(self) -> int:
        """Length in elements of the buffer of these weights; the gradients' is as long."""
        return sum(self.buckets)

    @property
    def elements(self) -> list[int]:
        """Number of elements that each rank updates."""
        return [sum(weight.numel for weight in weights) for weights in self.owned]


def ownership(run: Run, world_size: int, backend: Backend, *, stage: int = 0) -> list[Ownership]:
    """Return the owners of all matrices under Muon on a pipeline stage, one entry for each group.

    Args:
        run: a resolved run.
        world_size: number of ranks.
        backend: backend of the modules.
        stage: pipeline stage, from 0.
    """
    groups = []
    for group, count in _replicas(run.layout, world_size).items():
        owned: list[list[Weight]] = [[] for _ in range(count)]
        buckets: list[int] = []
        exchanged = 0
        for chunk in range(run.layout.vpp):
            size = bucket_size(run, world_size, stage=stage, chunk=chunk)
            weights = [
                weight
                for weight in _members(run, backend, group, stage, chunk)
                if uses_muon(weight, run.optimizer)
            ]
            sizes = [weight.numel for weight in weights]
            owners, lengths = assign_owners(sizes, count, size)
            # Even shares move no matrix to another owner (`muon.even_shares`).
            if run.optimizer.muon_dense_shards == "even" and group == "dense":
                even = even_buffer(sizes, count, size)
                lengths = [end - start for start, end in even.buckets]
                exchanged += even.exchanged(sizes, owners, count)
            # The backward pass reaches the last virtual stage first.
            buckets = lengths + buckets
            for weight, owner in zip(weights, owners, strict=True):
                owned[owner].append(weight)
        groups.append(
            Ownership(
                group=group,
                owned=tuple(map(tuple, owned)),
                buckets=tuple(buckets),
                exchanged=exchanged,
            )
        )
    return groups


def adam_weights(
    run: Run, world_size: int, backend: Backend, *, stage: int = 0
) -> list[tuple[int, list[Weight]]]:
    """Return the weights that Adam updates on a pipeline stage, one entry for each buffer.

    Args:
        run, world_size, backend, stage: as for `ownership`.

    Returns:
        Number of ranks that divide the buffer's state, and the weights in it. Groups come in the
        order of `ownership`; inside one, the virtual stages from 0.
    """
    buffers = []
    for group, count in _replicas(run.layout, world_size).items():
        for chunk in range(run.layout.vpp):
            weights = [
                weight
                for weight in _members(run, backend, group, stage, chunk)
                if not uses_muon(weight, run.optimizer)
            ]
            buffers.append((count, weights))
    return buffers


def buffer_elements(run: Run, world_size: int, backend: Backend, *, stage: int = 0) -> int:
    """Return the length in elements of all weight buffers on a rank of a pipeline stage.

    Gradient buffers have the same length. Arguments as for `ownership`.
    """
    layout = run.layout
    total = sum(owners.buffer for owners in ownership(run, world_size, backend, stage=stage))
    # `adam_weights` returns all virtual stages of the first group, then those of the second.
    chunks = itertools.cycle(range(layout.vpp))
    for (ranks, weights), chunk in zip(
        adam_weights(run, world_size, backend, stage=stage), chunks, strict=False
    ):
        # The first and the last stage hold the same embedding. Its gradient is summed between
        # them, in a bucket of its own (core/models/common/language_module/
        # language_module.py:262-284, 0.19.2).
        shared = layout.pp > 1 and run.architecture.num_mtp_layers > 0
        alone = {
            index
            for index, weight in enumerate(weights)
            if shared and weight.component == "embedding"
        }
        size = bucket_size(run, world_size, stage=stage, chunk=chunk)
        sizes = [weight.numel for weight in weights]
        total += even_buffer(sizes, ranks, size, alone=alone).length
    return total


def _replicas(layout: Layout, world_size: int) -> dict[str, int]:
    """Return the number of ranks that hold the same weights, by group.

    Experts are a group if their data-parallel ranks differ from the other weights'.
    """
    ranks = {"dense": layout.data_parallel(world_size) * layout.cp}
    if experts_have_own_data_parallel_group(layout):
        ranks["experts"] = layout.expert_data_parallel(world_size)
    return ranks


def experts_have_own_data_parallel_group(layout: Layout) -> bool:
    """Return true if experts' gradients are reduced among other ranks than the other weights'.

    megatron/core/tensor_parallel/layers.py:961 (0.19.2).
    """
    return layout.ep > 1 or layout.etp != layout.tp


def _members(run: Run, backend: Backend, group: str, stage: int, chunk: int) -> list[Weight]:
    """Return the weights of a group on one virtual stage."""
    apart = experts_have_own_data_parallel_group(run.layout)
    return [
        weight
        for weight in local_weights(run.architecture, run.layout, backend, stage=stage, chunk=chunk)
        if (group == "experts") == (apart and weight.component == "experts")
    ]
