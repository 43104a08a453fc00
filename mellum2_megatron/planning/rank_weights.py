"""Which weights a rank holds, in Megatron's order, and which data-parallel rank updates each
matrix. No torch.

Both are held against the model and the optimizer that Megatron builds
(tests/planning/test_optimizer_report.py).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mellum2_megatron.architecture import Component, Mellum2Architecture, Parameter, Shape
from mellum2_megatron.config import Backend, Layout, Optimizer, Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One parameter of a rank.

    Attributes:
        name: Megatron's, with the layer's number in the whole model and the expert's on this rank.
        shape: on this rank, ``[out, in]`` for a matrix.
        component: what it belongs to.
        split: dimension that tensor parallelism divides, or None.
    """

    name: str
    shape: Shape
    component: Component
    split: int | None = None

    @property
    def kind(self) -> str:
        """The name without numbers: ``decoder.layers.*.mlp.router.weight``."""
        return re.sub(r"\.\d+\.", ".*.", re.sub(r"weight\d+$", "weight*", self.name))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def local_weights(
    architecture: Mellum2Architecture,
    layout: Layout,
    backend: Backend,
    *,
    stage: int = 0,
    chunk: int = 0,
) -> list[Weight]:
    """Return the weights of virtual stage ``chunk`` on a rank of pipeline stage ``stage``, in
    Megatron's order."""
    part = chunk * layout.pp + stage
    layers = architecture.num_hidden_layers // (layout.pp * layout.vpp)
    first, last = part == 0, part == layout.pp * layout.vpp - 1
    hidden, mtp = architecture.hidden_size, architecture.num_mtp_layers
    vocabulary = (architecture.vocab_size // layout.tp, hidden)
    weights: list[Weight] = []
    if first or (last and mtp):  # the MTP layer embeds the next token itself
        weights.append(
            Weight(
                name="embedding.word_embeddings.weight",
                shape=vocabulary,
                component="embedding",
                split=0,
            )
        )
    for layer in range(part * layers, (part + 1) * layers):
        weights += _layer(architecture, layout, backend, f"decoder.layers.{layer}.")
    if last:
        weights.append(_norm("decoder.final_layernorm.weight", hidden))
        for layer in range(mtp):
            prefix = f"mtp.layers.{layer}."
            weights += [_norm(f"{prefix}{name}.weight", hidden) for name in ("enorm", "hnorm")]
            shape = (hidden // layout.tp, 2 * hidden)
            weights.append(
                Weight(
                    name=f"{prefix}eh_proj.weight", shape=shape, component="mtp projection", split=0
                )
            )
            weights += _layer(architecture, layout, backend, f"{prefix}mtp_model_layer.")
            weights.append(_norm(f"{prefix}final_layernorm.weight", hidden))
        weights.append(
            Weight(name="output_layer.weight", shape=vocabulary, component="output head", split=0)
        )
    return weights


def _layer(
    architecture: Mellum2Architecture, layout: Layout, backend: Backend, prefix: str
) -> Iterator[Weight]:
    a, hidden = architecture, architecture.hidden_size
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    attention = f"{prefix}self_attention."
    if backend == "torch":
        yield _norm(f"{prefix}input_layernorm.weight", hidden)
    shape = (hidden, queries // layout.tp)
    yield Weight(name=f"{attention}linear_proj.weight", shape=shape, component="attention", split=1)
    if backend == "te":
        yield _norm(f"{attention}linear_qkv.layer_norm_weight", hidden)
    shape = ((queries + 2 * keys) // layout.tp, hidden)
    yield Weight(name=f"{attention}linear_qkv.weight", shape=shape, component="attention", split=0)
    for name in ("q_layernorm", "k_layernorm"):
        yield _norm(f"{attention}{name}.weight", a.head_dim)
    yield _norm(f"{prefix}pre_mlp_layernorm.weight", hidden)
    yield Weight(
        name=f"{prefix}mlp.router.weight", shape=(a.num_experts, hidden), component="router"
    )
    width, count = a.moe_intermediate_size // layout.etp, a.num_experts // layout.ep
    shapes = {"linear_fc1": ((2 * width, hidden), 0), "linear_fc2": ((hidden, width), 1)}
    order = (
        itertools.product(range(count), shapes) if backend == "torch" else _by_name(shapes, count)
    )
    for expert, name in order:
        inside = (
            f"local_experts.{expert}.{name}.weight"
            if backend == "torch"
            else f"{name}.weight{expert}"
        )
        shape, split = shapes[name]
        yield Weight(
            name=f"{prefix}mlp.experts.{inside}", shape=shape, component="experts", split=split
        )


def _by_name(names: Iterable[str], count: int) -> Iterator[tuple[int, str]]:
    """A grouped linear layer holds one matrix of every expert."""
    return ((expert, name) for name in names for expert in range(count))


def _norm(name: str, size: int) -> Weight:
    return Weight(name=name, shape=(size,), component="norms")


def uses_muon(weight: Weight, optimizer: Optimizer) -> bool:
    """Whether Muon updates the weight; Adam does otherwise."""
    return optimizer.uses_muon(Parameter(weight.name, weight.shape, weight.component))


_ALIGNMENT = 64
"""Elements that a matrix' place in the gradient buffer is a multiple of
(core/optimizer/param_layout.py:26, 0.19.2)."""

_FULL = 0.9
"""A bucket is closed no earlier than when it fills so much of what its largest matrix makes it
take."""


def assign_owners(
    sizes: Sequence[int], ranks: int, bucket_size: int | None
) -> tuple[list[int], int]:
    """Return which data-parallel rank holds the state of each matrix and updates it, and the
    buffer's length.

    Matrices go into buckets in the order of the backward pass; inside one, the largest first, each
    to the rank with the least so far. In the buffers of weights and gradients, which every rank has
    in full, each rank's share of a bucket takes as much room as the largest
    (megatron/core/optimizer/layer_wise_optimizer.py:196-370, 0.19.2).

    Args:
        sizes: elements of each matrix, in the order of the forward pass.
        ranks: that divide the state among them.
        bucket_size: elements at which a bucket is closed; None for one bucket.

    Returns:
        Owner of each matrix, and elements of the buffer that holds them all.
    """
    owners = [0] * len(sizes)
    bucket: list[int] = []
    buffer = 0
    share = math.lcm(_ALIGNMENT, math.lcm(ranks, 128) // ranks)

    def close() -> None:
        nonlocal buffer
        loads = [0] * ranks
        for index in sorted(bucket, key=lambda index: -sizes[index]):
            owner = loads.index(min(loads))
            owners[index] = owner
            loads[owner] = _round_up(loads[owner], _ALIGNMENT) + sizes[index]
        buffer += ranks * _round_up(max(loads), share)
        bucket.clear()

    largest = total = 0
    for index in reversed(range(len(sizes))):
        bucket.append(index)
        largest, total = max(largest, sizes[index]), total + sizes[index]
        if bucket_size is not None and total >= max(bucket_size, int(ranks * largest * _FULL)):
            close()
            largest = total = 0
    if bucket:
        close()
    return owners, buffer


def adam_buffer_length(
    sizes: Sequence[int], ranks: int, bucket_size: int | None, *, alone: Container[int] = ()
) -> int:
    """Return the length of a buffer of weights whose state the ranks divide element by element, as
    under Adam.

    Each weight is aligned, and each bucket's end is a multiple of the ranks
    (megatron/core/optimizer/distrib_optimizer.py:506-585, 0.19.2).

    Args:
        sizes: elements of each weight, in the order of the forward pass.
        ranks: that divide the state among them.
        bucket_size: elements at which a bucket is closed; None for one bucket.
        alone: weights, by their place in ``sizes``, that have a bucket of their own.
    """
    unit = math.lcm(ranks, 128)
    start = end = 0  # of the open bucket
    for index in reversed(range(len(sizes))):
        end = _round_up(end, _ALIGNMENT)
        if index in alone:
            start = end = _round_up(end, unit)
        end += sizes[index]
        if index in alone or (bucket_size is not None and end - start >= bucket_size):
            start = end = _round_up(end, unit)
    return _round_up(end, unit)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def bucket_size(run: Run, world_size: int, *, stage: int, chunk: int) -> int | None:
    """Return the elements of a gradient bucket (megatron/training/training.py:1552-1568 and
    1861-1868, 0.19.2)."""
    if not run.optimizer.overlap_grad_reduce or stage or chunk:
        return None
    return max(40_000_000, 1_000_000 * run.layout.data_parallel(world_size) * run.layout.cp)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ownership:
    """How the matrices under Muon are divided among ranks that hold the same weights.

    Attributes:
        group: ``dense``, or ``experts`` where these have data-parallel ranks of their own.
        owned: the matrices of each rank in the group.
        buffer: elements of the buffers that hold these weights, and their gradients, on every rank.
    """

    group: str
    owned: tuple[tuple[Weight, ...], ...]
    buffer: int

    @property
    def elements(self) -> list[int]:
        """Elements that each rank updates."""
        return [sum(weight.numel for weight in own) for own in self.owned]


def ownership(run: Run, world_size: int, backend: Backend, *, stage: int = 0) -> list[Ownership]:
    """Return the owners of all matrices under Muon on pipeline stage ``stage``, by group."""
    found = []
    for group, count in _replicas(run.layout, world_size).items():
        owned: list[list[Weight]] = [[] for _ in range(count)]
        buffer = 0
        for chunk in range(run.layout.vpp):
            size = bucket_size(run, world_size, stage=stage, chunk=chunk)
            weights = [
                each
                for each in _members(run, backend, group, stage, chunk)
                if uses_muon(each, run.optimizer)
            ]
            owners, length = assign_owners([weight.numel for weight in weights], count, size)
            buffer += length
            for weight, owner in zip(weights, owners, strict=True):
                owned[owner].append(weight)
        found.append(Ownership(group=group, owned=tuple(map(tuple, owned)), buffer=buffer))
    return found


def adam_weights(
    run: Run, world_size: int, backend: Backend, *, stage: int = 0
) -> list[tuple[int, list[Weight]]]:
    """Return what Adam updates on pipeline stage ``stage``, by buffer: the ranks that divide it,
    and its weights."""
    return [
        (
            count,
            [
                each
                for each in _members(run, backend, group, stage, chunk)
                if not uses_muon(each, run.optimizer)
            ],
        )
        for group, count in _replicas(run.layout, world_size).items()
        for chunk in range(run.layout.vpp)
    ]


def buffer_elements(run: Run, world_size: int, backend: Backend, *, stage: int = 0) -> int:
    """Return the elements of all buffers of weights on a rank of pipeline stage ``stage``;
    gradients have as many."""
    layout = run.layout
    total = sum(each.buffer for each in ownership(run, world_size, backend, stage=stage))
    chunks = itertools.cycle(range(layout.vpp))
    for (ranks, weights), chunk in zip(
        adam_weights(run, world_size, backend, stage=stage), chunks, strict=False
    ):
        # The first and the last stage hold the same embedding (core/models/common/language_module/
        # language_module.py:262-284, 0.19.2); its gradient is summed apart from the others.
        shared = layout.pp > 1 and run.architecture.num_mtp_layers > 0
        alone = {
            place
            for place, weight in enumerate(weights)
            if shared and weight.component == "embedding"
        }
        size = bucket_size(run, world_size, stage=stage, chunk=chunk)
        total += adam_buffer_length([weight.numel for weight in weights], ranks, size, alone=alone)
    return total


def _replicas(layout: Layout, world_size: int) -> dict[str, int]:
    """Return how many ranks hold the same weights, by group; experts are one if their ranks are not
    the others'."""
    ranks = {"dense": layout.data_parallel(world_size) * layout.cp}
    if experts_have_own_data_parallel_group(layout):
        ranks["experts"] = layout.expert_data_parallel(world_size)
    return ranks


def experts_have_own_data_parallel_group(layout: Layout) -> bool:
    """Whether experts are reduced in groups of their own (core/tensor_parallel/layers.py:961,
    0.19.2)."""
    return layout.ep > 1 or layout.etp != layout.tp


def _members(run: Run, backend: Backend, group: str, stage: int, chunk: int) -> list[Weight]:
    apart = experts_have_own_data_parallel_group(run.layout)
    return [
        weight
        for weight in local_weights(run.architecture, run.layout, backend, stage=stage, chunk=chunk)
        if (group == "experts") == (apart and weight.component == "experts")
    ]
