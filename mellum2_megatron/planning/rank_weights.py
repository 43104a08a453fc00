"""The weights of a rank in Megatron's order.

tests/planning/test_optimizer_report.py compares them with the model that Megatron builds. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mellum2_megatron.architecture import (
    Component,
    Mellum2Architecture,
    MlpType,
    Parameter,
    Shape,
)
from mellum2_megatron.config import Backend, Layout, Optimizer


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
