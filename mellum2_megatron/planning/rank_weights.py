"""The weights of a rank in Megatron's order, and the data-parallel rank that updates each matrix.

tests/planning/test_optimizer_report.py compares both with the model and the optimizer that Megatron
builds. No torch.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from mellum2_megatron.architecture import (
    Component,
    Mellum2Architecture,
    MlpType,
    Parameter,
    Shape,
)
from mellum2_megatron.config import Backend, Layout, Optimizer, Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One parameter of a rank.

    Attributes:
        name: Megatron's name; layers are numbered over the whole model, experts on this rank.
        shape: shape on this rank, ``[out, in]`` for a matrix.
        component: part of the model that the weight belongs to.
        split: index of the dimension that tensor parallelism divides; None (default): not divided.
    """

    name: str
    shape: Shape
    component: Component
    split: int | None = None

    @property
    def kind(self) -> str:
        """Name with ``*`` for each number, such as ``decoder.layers.*.mlp.router.weight``."""
        return re.sub(r"\.\d+\.", ".*.", re.sub(r"weight\d+$", "weight*", self.name))

    @property
    def numel(self) -> int:
        """Number of elements on this rank."""
        return math.prod(self.shape)


def stage_layers(architecture: Mellum2Architecture, layout: Layout, stage: int) -> list[list[int]]:
    """Return the decoder layers of a pipeline stage, from 0, one list for each virtual stage."""
    count = architecture.num_hidden_layers // (layout.pp * layout.vpp)
    starts = [(part * layout.pp + stage) * count for part in range(layout.vpp)]
    return [list(range(start, start + count)) for start in starts]


def local_weights(
    architecture: Mellum2Architecture,
    layout: Layout,
    backend: Backend,
    *,
    stage: int = 0,
    chunk: int = 0,
) -> list[Weight]:
    """Return the weights of a rank in Megatron's order.

    Args:
        architecture: the model.
        layout: the layout.
        backend: backend of the modules, which decides the place of norms and the form of experts.
        stage: pipeline stage of the rank, from 0 (default).
        chunk: virtual stage of the rank, from 0 (default).
    """
    # Layers are dealt out in turn: chunk 0 of all stages comes before chunk 1 of stage 0.
    part = chunk * layout.pp + stage
    layers = architecture.num_hidden_layers // (layout.pp * layout.vpp)
    first, last = part == 0, part == layout.pp * layout.vpp - 1
    hidden, mtp = architecture.hidden_size, architecture.num_mtp_layers
    vocabulary = (architecture.vocab_size // layout.tp, hidden)
    weights: list[Weight] = []
    # The MTP layer embeds the next token itself, so the last stage has a copy of the embedding.
    if first or (last and mtp):
        weights.append(
            Weight(
                name="embedding.word_embeddings.weight",
                shape=vocabulary,
                component="embedding",
                split=0,
            )
        )
    for layer in range(part * layers, (part + 1) * layers):
        weights += _layer(
            architecture,
            layout,
            backend,
            f"decoder.layers.{layer}.",
            architecture.mlp_type(layer),
        )
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
            weights += _layer(
                architecture,
                layout,
                backend,
                f"{prefix}mtp_model_layer.",
                architecture.mtp_mlp_type,
            )
            weights.append(_norm(f"{prefix}final_layernorm.weight", hidden))
        weights.append(
            Weight(name="output_layer.weight", shape=vocabulary, component="output head", split=0)
        )
    return weights


def _layer(
    architecture: Mellum2Architecture,
    layout: Layout,
    backend: Backend,
    prefix: str,
    mlp: MlpType,
) -> Iterator[Weight]:
    """Yield the weights of one decoder layer, or of the MTP layer's."""
    a, hidden = architecture, architecture.hidden_size
    attention = _attention if a.latent_attention is None else _latent_attention
    yield from attention(a, layout, backend, prefix)
    if mlp == "dense":
        # Transformer Engine fuses the norm before a dense MLP into its first matrix.
        norm = "pre_mlp_layernorm." if backend == "torch" else "mlp.linear_fc1.layer_norm_"
        yield _norm(f"{prefix}{norm}weight", hidden)
        yield from _gated_mlp(
            f"{prefix}mlp.", hidden, a.intermediate_size // layout.tp, "dense MLP"
        )
        return
    yield _norm(f"{prefix}pre_mlp_layernorm.weight", hidden)
    yield Weight(
        name=f"{prefix}mlp.router.weight", shape=(a.num_experts, hidden), component="router"
    )
    width, count = a.moe_intermediate_size // layout.etp, a.num_experts // layout.ep
    shapes = {"linear_fc1": ((2 * width, hidden), 0), "linear_fc2": ((hidden, width), 1)}
    if backend == "torch":  # one module for each expert
        names = [
            (f"local_experts.{expert}.{linear}.weight", linear)
            for expert in range(count)
            for linear in shapes
        ]
    else:  # a grouped linear layer holds one matrix of every expert
        names = [
            (f"{linear}.weight{expert}", linear) for linear in shapes for expert in range(count)
        ]
    for name, linear in names:
        shape, split = shapes[linear]
        yield Weight(
            name=f"{prefix}mlp.experts.{name}", shape=shape, component="experts", split=split
        )
    if a.shared_expert_intermediate_size is not None:
        yield from _gated_mlp(
            f"{prefix}mlp.shared_experts.",
            hidden,
            a.shared_expert_intermediate_size // layout.tp,
            "shared expert",
        )


def _attention(
    architecture: Mellum2Architecture, layout: Layout, backend: Backend, prefix: str
) -> Iterator[Weight]:
    """Yield the weights of grouped-query attention, and the norm before it."""
    a, hidden, attention = architecture, architecture.hidden_size, f"{prefix}self_attention."
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    # Transformer Engine fuses the input norm into the QKV projection (below).
    if backend == "torch":
        yield _norm(f"{prefix}input_layernorm.weight", hidden)
    # Megatron makes the output projection in Attention and QKV in its subclass
    # (core/transformer/attention.py:413 and 1681, 0.19.2).
    shape = (hidden, queries // layout.tp)
    yield Weight(name=f"{attention}linear_proj.weight", shape=shape, component="attention", split=1)
    if backend == "te":
        yield _norm(f"{attention}linear_qkv.layer_norm_weight", hidden)
    shape = ((queries + 2 * keys) // layout.tp, hidden)
    yield Weight(name=f"{attention}linear_qkv.weight", shape=shape, component="attention", split=0)
    for name in ("q_layernorm", "k_layernorm"):
        yield _norm(f"{attention}{name}.weight", a.head_dim)


def _latent_attention(
    architecture: Mellum2Architecture, layout: Layout, backend: Backend, prefix: str
) -> Iterator[Weight]:
    """Yield the weights of latent attention, and the norm before it."""
    latent, heads, hidden = (
        architecture.latent_attention,
        architecture.num_attention_heads // layout.tp,
        architecture.hidden_size,
    )
    assert latent is not None
    yield _norm(f"{prefix}input_layernorm.weight", hidden)
    q, kv = latent.q_lora_rank, latent.kv_lora_rank
    # Only the torch backend divides the projections to latents (`model.latent_attention`).
    ways, down = (layout.tp, 0) if backend == "torch" else (1, None)
    queries = heads * latent.qk_head_dim
    shapes: dict[str, tuple[Shape, int | None]] = {
        "linear_proj": ((hidden, heads * latent.v_head_dim), 1)
    }
    if q is None:
        shapes["linear_q_proj"] = ((queries, hidden), 0)
    else:
        shapes["linear_q_down_proj"] = ((q // ways, hidden), down)
        shapes["linear_q_up_proj"] = ((queries, q), 0)
    shapes["linear_kv_down_proj"] = (((kv + latent.qk_rope_head_dim) // ways, hidden), down)
    shapes["linear_kv_up_proj"] = ((heads * (latent.qk_nope_head_dim + latent.v_head_dim), kv), 0)
    for name, (shape, split) in shapes.items():
        name = f"{prefix}self_attention.{name}.weight"
        yield Weight(name=name, shape=shape, component="attention", split=split)
    for name, size in (("q_layernorm", q), ("kv_layernorm", kv)):
        if size is not None:
            yield _norm(f"{prefix}self_attention.{name}.weight", size)


def _gated_mlp(prefix: str, hidden: int, width: int, component: Component) -> Iterator[Weight]:
    """Yield the two weights of an MLP that tensor parallelism divides; `width` is a rank's."""
    fc1, fc2 = f"{prefix}linear_fc1.weight", f"{prefix}linear_fc2.weight"
    yield Weight(name=fc1, shape=(2 * width, hidden), component=component, split=0)
    yield Weight(name=fc2, shape=(hidden, width), component=component, split=1)


def _norm(name: str, size: int) -> Weight:
    return Weight(name=name, shape=(size,), component="norms")


def uses_muon(weight: Weight, optimizer: Optimizer) -> bool:
    """Return true if Muon updates the weight, false if Adam does."""
    return optimizer.uses_muon(Parameter(weight.name, weight.shape, weight.component))


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
