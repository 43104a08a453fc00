"""The single description of Mellum 2; model, converter, recipes and all figures derive from it.

`Mellum2Architecture` holds the numbers of the released Hugging Face ``config.json`` under their own
names. `Mellum2Architecture.parameters` lists every tensor of the released safetensors layout.
Parameter counts, active parameters and FLOPs are sums over that list. No torch: describing a 12B
model is instant.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from mellum2_megatron.architecture.rope import RopeParameters
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.field_checks import (
    divisors,
    is_int,
    is_number,
    require,
    require_positive_int,
    require_positive_number,
)
from mellum2_megatron.common.values import from_mapping

Shape = tuple[int, ...]
LayerType = Literal["sliding_attention", "full_attention"]
Component = Literal[
    "embedding", "attention", "router", "experts", "norms", "mtp projection", "output head"
]

ALIGNMENT = 128
"""Divisor of every matrix dimension of a model trained here (report §2, alignment rule)."""


class Parameter(NamedTuple):
    """One tensor of the released layout.

    Attributes:
        name: key in the safetensors files, e.g. ``model.layers.3.mlp.experts.7.up_proj.weight``.
        shape: as stored, ``[out, in]`` for a matrix.
        component: row of `mellum2 info` that counts it.
        layer: index inside its stack (trunk, or MTP with ``mtp``); None (default) for embedding,
            final norm and head.
        expert: index of the routed expert; None (default) outside experts.
        mtp: true for a tensor of the multi-token-prediction head, default false.
    """

    name: str
    shape: Shape
    component: Component
    layer: int | None = None
    expert: int | None = None
    mtp: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mellum2Architecture:
    """A Mellum 2 model: layers of GQA attention with QK-norm and a dropless mixture of experts.

    Field names and meanings are those of transformers' ``MellumConfig`` (5.23).

    Attributes:
        vocab_size: rows of the embedding and of the output head, which are separate matrices.
        hidden_size: width of the residual stream.
        intermediate_size: width of a dense MLP. Carried for ``config.json`` only: no layer of the
            family is dense.
        num_hidden_layers: trunk layers.
        num_attention_heads: query heads of a layer.
        num_key_value_heads: key heads of a layer, and as many value heads.
        head_dim: width of a head.
        moe_intermediate_size: inner width of one expert.
        num_experts: routed experts of a layer.
        num_experts_per_tok: experts that one token uses in a layer.
        norm_topk_prob: renormalise the router's probabilities over a token's experts, default true.
        router_aux_loss_coef: coefficient in ``config.json``, default 0.001. `mellum2 train` reads
            the run's ``loss.aux_loss_coef`` instead.
        sliding_window: keys that a query of a sliding layer sees, its own included: query ``i``
            sees key ``j`` iff ``0 <= i - j < sliding_window`` (report §2). None without sliding
            layers.
        layer_types: attention type of each trunk layer.
        rope_full_attention, rope_sliding_attention: rotary embedding of each attention type.
        rms_norm_eps: epsilon of every norm, default 1e-6.
        initializer_range: standard deviation of the initial weights, default 0.02.
        max_position_embeddings: context length in tokens.
        num_mtp_layers: multi-token-prediction layers, 0 (default) or 1.
        mtp_layer_types: attention type of each multi-token-prediction layer, default none.
        bos_token_id, eos_token_id, pad_token_id: token ids in ``config.json``; None (default):
            absent.

    Raises:
        InputError: a value that no Mellum 2 model can have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001
    sliding_window: int | None
    layer_types: tuple[LayerType, ...]
    rope_full_attention: RopeParameters
    rope_sliding_attention: RopeParameters
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int
    num_mtp_layers: int = 0
    mtp_layer_types: tuple[LayerType, ...] = ()
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        require_positive_int("vocab_size", self.vocab_size)
        require_positive_int("hidden_size", self.hidden_size)
        require_positive_int("intermediate_size", self.intermediate_size)
        require_positive_int("num_hidden_layers", self.num_hidden_layers)
        require_positive_int("num_attention_heads", self.num_attention_heads)
        require_positive_int("num_key_value_heads", self.num_key_value_heads)
        require_positive_int("head_dim", self.head_dim)
        require_positive_int("moe_intermediate_size", self.moe_intermediate_size)
        require_positive_int("num_experts", self.num_experts)
        require_positive_int("num_experts_per_tok", self.num_experts_per_tok)
        require_positive_int("max_position_embeddings", self.max_position_embeddings)
        require_positive_number("rms_norm_eps", self.rms_norm_eps)
        require_positive_number("initializer_range", self.initializer_range)
        require(
            is_number(self.router_aux_loss_coef) and self.router_aux_loss_coef >= 0,
            f"router_aux_loss_coef={self.router_aux_loss_coef!r}",
            rule="it must be >= 0",
            fix="use 0.001",
        )
        require(
            isinstance(self.norm_topk_prob, bool),
            f"norm_topk_prob={self.norm_topk_prob!r}",
            rule="it must be true or false",
            fix="use true",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_key_value_heads={self.num_key_value_heads}",
            rule=f"it must divide num_attention_heads ({self.num_attention_heads})",
            fix=f"use one of {divisors(self.num_attention_heads)}",
        )
        require(
            self.head_dim % 2 == 0,
            f"head_dim={self.head_dim}",
            rule="RoPE rotates pairs, so it must be even",
            fix="use an even head_dim",
        )
        require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok={self.num_experts_per_tok}",
            rule=f"a token cannot use more than num_experts ({self.num_experts}) experts",
            fix=f"use at most {self.num_experts}",
        )
        self._check_layers()
        # Types only: transformers merely warns of an id outside the vocabulary, and released
        # folders hold such ids.
        eos = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        for name, value in (
            ("bos_token_id", self.bos_token_id),
            ("pad_token_id", self.pad_token_id),
            *(("eos_token_id", token) for token in eos),
        ):
            require(
                value is None or is_int(value),
                f"{name}={value!r}",
                rule="a token id is a whole number",
                fix="use an id or null",
            )

    def _check_layers(self) -> None:
        """Refuse layer types that are unknown or do not match the numbers of layers."""
        require(
            is_int(self.num_mtp_layers) and self.num_mtp_layers in (0, 1),
            f"num_mtp_layers={self.num_mtp_layers!r}",
            rule="Mellum 2 has at most one multi-token-prediction layer "
            "(as transformers' MellumConfig)",
            fix="use 0 or 1",
        )
        for name, types, counted, count in (
            ("layer_types", self.layer_types, "num_hidden_layers", self.num_hidden_layers),
            ("mtp_layer_types", self.mtp_layer_types, "num_mtp_layers", self.num_mtp_layers),
        ):
            require(
                isinstance(types, tuple),
                f"{name}={types!r}",
                rule="it must be a tuple of layer types",
                fix="give a tuple",
            )
            for value in types:
                if value not in get_args(LayerType):
                    raise InputError(
                        f"{name} entry {value!r}",
                        rule="a layer is sliding_attention or full_attention",
                        fix=nearest(str(value), get_args(LayerType)),
                    )
            require(
                len(types) == count,
                f"{name} with {len(types)} entries",
                rule=f"it must have one entry per layer ({counted}={count})",
                fix=f"give {count} entries, or change {counted} to {len(types)}",
            )
        if self.sliding_window is not None:
            require_positive_int("sliding_window", self.sliding_window)
        else:
            require(
                "sliding_attention" not in self.layer_types + self.mtp_layer_types,
                "sliding_window=None",
                rule="a sliding_attention layer needs its window",
                fix="use e.g. 1024",
            )

    @classmethod
    def preset(cls, name: str) -> Mellum2Architecture:
        """Return the preset called ``name``.

        Raises:
            InputError: an unknown name; the message names the nearest.
        """
        if name not in PRESETS:
            raise InputError(
                f"architecture preset {name!r}",
                rule="no preset has that name",
                fix=nearest(name, PRESETS),
            )
        return PRESETS[name]

    def replace(self, **changes: Any) -> Mellum2Architecture:
        """Return a variant with ``changes`` applied and validated.

        Two changes adapt another field, unless that one is changed too. ``num_hidden_layers``
        continues or cuts the repeating pattern of ``layer_types``. ``num_mtp_layers`` makes the
        MTP layers sliding, as in the released layout.

        Raises:
            InputError: an unknown field (the nearest is named) or an invalid value.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise InputError(
                    f"architecture.{name}",
                    rule="Mellum2Architecture has no such field",
                    fix=nearest(name, known),
                )
        # A value of another type is left to __post_init__, which refuses it by name.
        layers = changes.get("num_hidden_layers")
        if isinstance(layers, int) and "layer_types" not in changes:
            period = _period(self.layer_types)
            changes["layer_types"] = tuple(period[i % len(period)] for i in range(layers))
        mtp_layers = changes.get("num_mtp_layers")
        if (
            isinstance(mtp_layers, int)
            and mtp_layers != self.num_mtp_layers
            and "mtp_layer_types" not in changes
        ):
            changes["mtp_layer_types"] = ("sliding_attention",) * mtp_layers
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``architecture.json``: the fields, as JSON types."""
        values = dataclasses.asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mellum2Architecture:
        """Invert `to_dict`.

        Raises:
            InputError: a missing or unknown field, or an invalid value.
        """
        return from_mapping(cls, values, document="model description", key="architecture")

    def layer_type(self, layer: int) -> LayerType:
        """Return the attention type of trunk layer ``layer`` (from 0)."""
        return self.layer_types[layer]

    def rope(self, layer_type: LayerType) -> RopeParameters:
        """Return the rotary embedding of every layer of ``layer_type``, trunk and MTP."""
        if layer_type == "full_attention":
            return self.rope_full_attention
        return self.rope_sliding_attention

    def parameters(self, *, mtp: bool = True) -> Iterator[Parameter]:
        """Yield every tensor of the released safetensors layout, in the order of a forward pass.

        Each expert's matrices are tensors of their own.

        Args:
            mtp: include the multi-token-prediction head, if the model has one. It shares embedding
                and output head with the trunk, so neither appears twice.
        """
        hidden, vocabulary = self.hidden_size, self.vocab_size
        yield Parameter("model.embed_tokens.weight", (vocabulary, hidden), "embedding")
        for layer in range(self.num_hidden_layers):
            yield from self._layer_parameters(f"model.layers.{layer}.", layer, mtp=False)
        yield Parameter("model.norm.weight", (hidden,), "norms")
        yield Parameter("lm_head.weight", (vocabulary, hidden), "output head")
        for layer in range(self.num_mtp_layers if mtp else 0):
            yield Parameter("mtp.pre_fc_norm_embedding.weight", (hidden,), "norms", layer, mtp=True)
            yield Parameter("mtp.pre_fc_norm_hidden.weight", (hidden,), "norms", layer, mtp=True)
            # Its input is the next token's embedding, then the trunk's hidden state.
            yield Parameter(
                "mtp.fc.weight", (hidden, 2 * hidden), "mtp projection", layer, mtp=True
            )
            yield from self._layer_parameters(f"mtp.layers.{layer}.", layer, mtp=True)
            yield Parameter("mtp.norm.weight", (hidden,), "norms", layer, mtp=True)

    def _layer_parameters(self, prefix: str, layer: int, *, mtp: bool) -> Iterator[Parameter]:
        hidden, expert_width = self.hidden_size, self.moe_intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        tensors: list[tuple[str, Shape, Component]] = [
            ("input_layernorm.weight", (hidden,), "norms"),
            ("self_attn.q_proj.weight", (queries, hidden), "attention"),
            ("self_attn.k_proj.weight", (keys, hidden), "attention"),
            ("self_attn.v_proj.weight", (keys, hidden), "attention"),
            ("self_attn.o_proj.weight", (hidden, queries), "attention"),
            ("self_attn.q_norm.weight", (self.head_dim,), "norms"),
            ("self_attn.k_norm.weight", (self.head_dim,), "norms"),
            ("post_attention_layernorm.weight", (hidden,), "norms"),
            ("mlp.gate.weight", (self.num_experts, hidden), "router"),
        ]
        for name, shape, component in tensors:
            yield Parameter(prefix + name, shape, component, layer, mtp=mtp)
        for expert in range(self.num_experts):
            for name, shape in (
                ("gate_proj", (expert_width, hidden)),
                ("up_proj", (expert_width, hidden)),
                ("down_proj", (hidden, expert_width)),
            ):
                key = f"{prefix}mlp.experts.{expert}.{name}.weight"
                yield Parameter(key, shape, "experts", layer, expert, mtp)

    def active_parameters(self, *, mtp: bool = True) -> Iterator[Parameter]:
        """Yield the parameters that one token uses: all but the experts it is not routed to.

        Both vocabulary matrices count in full, as in the published "2.5B active". A lookup reads
        one row of the embedding, yet 2,439,060,736 includes all 226,492,416 of its weights.
        """
        # Experts of a layer have equal sizes, so the first ones stand for the routed ones.
        for parameter in self.parameters(mtp=mtp):
            if parameter.expert is None or parameter.expert < self.num_experts_per_tok:
                yield parameter

    def num_parameters(self, mtp: bool = True) -> int:
        """Return the number of weights; ``mtp`` counts the multi-token-prediction head, if any."""
        return sum(parameter.numel for parameter in self.parameters(mtp=mtp))

    def num_active_parameters(self, mtp: bool = True) -> int:
        """Return the number of weights that one token uses; see `active_parameters`."""
        return sum(parameter.numel for parameter in self.active_parameters(mtp=mtp))

    def visible_pairs(self, layer_type: LayerType, sequence_length: int) -> int:
        """Return the number of (query, key) pairs of one head in one causal sequence.

        Query ``i`` (from 0) sees ``i + 1`` keys, on a sliding layer at most ``sliding_window``.

        Args:
            layer_type: attention type of the head's layer.
            sequence_length: tokens of the sequence.
        """
        require_positive_int("sequence_length", sequence_length)
        window = sequence_length
        if layer_type == "sliding_attention":
            assert self.sliding_window is not None  # checked in __post_init__
            window = min(sequence_length, self.sliding_window)
        # A triangle until the window is full, then `window` keys for each query.
        return window * (window + 1) // 2 + (sequence_length - window) * window

    def flops_by_component(self, sequence_length: int, mtp: bool = True) -> dict[str, int]:
        """Return the model FLOPs of one sequence, forward and backward, by component.

        A matrix weight costs one multiply and one add per token and pass. The backward pass counts
        as two passes (gradients of inputs and of weights). ``attention scores`` is QK^T and PV over
        `visible_pairs`. Not counted: the embedding (a lookup), norms, softmax, activations and
        recomputation. The MTP head runs over the whole sequence and runs the shared output head a
        second time.

        Args:
            sequence_length: tokens of one causal sequence that is one document.
            mtp: count the multi-token-prediction head, if the model has one; default true.
        """
        passes = 3  # one forward, two backward
        per_weight = 2 * passes * sequence_length  # a multiply and an add
        flops: dict[str, int] = {}
        for parameter in self.active_parameters(mtp=mtp):
            if len(parameter.shape) == 2 and parameter.component != "embedding":
                flops[parameter.component] = (
                    flops.get(parameter.component, 0) + per_weight * parameter.numel
                )
        # The MTP layer's logits come from the shared head, which `parameters` lists once.
        extra_heads = self.num_mtp_layers if mtp else 0
        flops["output head"] += extra_heads * per_weight * self.vocab_size * self.hidden_size
        # Two products (QK^T and PV), a multiply and an add each.
        per_pair = 2 * 2 * passes * self.num_attention_heads * self.head_dim
        layers = self.layer_types + (self.mtp_layer_types if mtp else ())
        flops["attention scores"] = per_pair * sum(
            self.visible_pairs(kind, sequence_length) for kind in layers
        )
        return flops

    def flops_per_token(self, sequence_length: int, mtp: bool = True) -> float:
        """Return the model FLOPs per token, forward and backward, averaged over a causal sequence.

        See `flops_by_component`. ``mellum2-12b`` at 8,192 tokens: 17.570e9 with MTP, 15.675e9
        without.
        """
        return sum(self.flops_by_component(sequence_length, mtp).values()) / sequence_length

    def misaligned_dimensions(self, alignment: int = ALIGNMENT) -> dict[str, int]:
        """Return the matrix dimensions that break the alignment rule (report §2), by field.

        The router's output (``num_experts``, 64 in the released model) is exempt: it is computed
        in FP32, never in FP8.
        """
        dimensions = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_attention_heads * head_dim": self.num_attention_heads * self.head_dim,
            "num_key_value_heads * head_dim": self.num_key_value_heads * self.head_dim,
        }
        return {name: size for name, size in dimensions.items() if size % alignment}


def _period(types: tuple[LayerType, ...]) -> tuple[LayerType, ...]:
    """Return the shortest prefix whose repetition gives ``types``, possibly ``types`` itself."""
    for length in range(1, len(types)):
        if all(types[i] == types[i % length] for i in range(len(types))):
            return types[:length]
    return types


_ROPE = RopeParameters(rope_type="default", rope_theta=500_000.0)
_PERIOD: tuple[LayerType, ...] = ("sliding_attention",) * 3 + ("full_attention",)

# Source: report §2, table "Architecture configuration"; released config.json.
_MELLUM2_12B = Mellum2Architecture(
    vocab_size=98304,
    hidden_size=2304,
    intermediate_size=7168,
    num_hidden_layers=28,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    moe_intermediate_size=896,
    num_experts=64,
    num_experts_per_tok=8,
    sliding_window=1024,
    layer_types=_PERIOD * 7,
    rope_full_attention=_ROPE,
    rope_sliding_attention=_ROPE,
    max_position_embeddings=8192,
    num_mtp_layers=1,
    mtp_layer_types=("sliding_attention",),
    bos_token_id=0,
    eos_token_id=28,
)

PRESETS: dict[str, Mellum2Architecture] = {
    "mellum2-12b": _MELLUM2_12B,
    # Report §4: YaRN on the full-attention layers only. attention_factor is 0.1 ln(16) + 1.
    "mellum2-12b-128k": _MELLUM2_12B.replace(
        max_position_embeddings=131072,
        rope_full_attention=RopeParameters(
            rope_type="yarn",
            rope_theta=500_000.0,
            factor=16.0,
            original_max_position_embeddings=8192,
            attention_factor=1.2772588722239782,
        ),
    ),
    # All parts of the 12B at a size that two CPU cores can train.
    "mellum2-tiny": _MELLUM2_12B.replace(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        sliding_window=64,
        max_position_embeddings=512,
        eos_token_id=1,
    ),
}
"""Named models of this repository; `Mellum2Architecture.replace` derives others."""
