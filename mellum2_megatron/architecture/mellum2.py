"""The single description of Mellum 2; model, converter, recipes and all figures derive from it.

`Mellum2Architecture` holds the numbers of the released Hugging Face ``config.json`` under their own
names. `Mellum2Architecture.parameters` lists every tensor of the released safetensors layout.
Parameter counts, active parameters and FLOPs are sums over that list. No torch: describing a 12B
model is instant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mellum2_megatron.architecture.checks import (
    LARGEST,
    MOST_MTP_LAYERS,
    LayerType,
    MlpType,
    check_architecture,
)
from mellum2_megatron.architecture.latent_attention import LatentAttention
from mellum2_megatron.architecture.parameter import Component, Parameter, Shape, gated_mlp
from mellum2_megatron.architecture.rope import RopeParameters
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.field_checks import (
    is_int,
    require_positive_int,
)
from mellum2_megatron.common.values import from_mapping

ALIGNMENT = 128
"""Divisor of every matrix dimension of a model trained here (report §2, alignment rule)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mellum2Architecture:
    """A Mellum 2 model: layers of GQA attention with QK-norm and a dropless mixture of experts.

    Field names and meanings are those of transformers' ``MellumConfig`` (5.23).

    Attributes:
        vocab_size: rows of the embedding and of the output head, which are separate matrices.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of a dense MLP. No layer of the released models is dense.
        num_hidden_layers: trunk layers.
        num_attention_heads: query heads of a layer.
        num_key_value_heads: key heads of a layer, and as many value heads.
        head_dim: width of a head.
        moe_intermediate_size: inner width of one expert.
        num_experts: routed experts of a layer.
        num_experts_per_tok: experts that one token uses in a layer.
        norm_topk_prob: renormalise the router's probabilities over a token's experts, default true.
            With one expert per token the probability is then 1, and the router learns from its
            auxiliary losses alone.
        router_aux_loss_coef: coefficient in ``config.json``, default 0.001. `mellum2 train` reads
            the run's ``loss.aux_loss_coef`` instead.
        sliding_window: keys that a query of a sliding layer sees, its own included: query ``i``
            sees key ``j`` iff ``0 <= i - j < sliding_window`` (report §2). None without sliding
            layers.
        layer_types: attention type of each trunk layer.
        mlp_layer_types: MLP of each trunk layer, ``sparse`` (a mixture of experts) or ``dense``.
            Empty (default): all sparse, as released. MTP's layer is sparse too, unless all trunk
            layers are dense.
        shared_expert_intermediate_size: inner width of an expert that every token uses, beside the
            routed ones of each sparse layer. None (default): no such expert, as released.
        latent_attention: widths of multi-head latent attention, which all layers then have;
            ``num_key_value_heads`` and ``head_dim`` are not used. None (default): none, as
            released. An override gives all widths at once: ``{kv_lora_rank: 256,
            qk_nope_head_dim: 64, qk_rope_head_dim: 64, v_head_dim: 128}``.
        rope_full_attention, rope_sliding_attention: rotary embedding of each attention type.
        rms_norm_eps: epsilon of every norm, default 1e-6.
        initializer_range: standard deviation of the initial weights, default 0.02.
        max_position_embeddings: context length in tokens.
        num_mtp_layers: multi-token-prediction layers, 0 (default), 1 as released, or up to 4. Each
            predicts one token further than the one before it.
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
    mlp_layer_types: tuple[MlpType, ...] = ()
    shared_expert_intermediate_size: int | None = None
    latent_attention: LatentAttention | None = None
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
        check_architecture(self)

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
        continues or cuts the repeating patterns of ``layer_types`` and ``mlp_layer_types``.
        A given pattern of these that divides the layers is repeated: ``("dense",)``.
        ``num_mtp_layers`` makes the MTP layers sliding, as in the released layout.

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
        # One beyond the largest is refused too, and its list would fill the memory.
        if layers is None:
            layers = self.num_hidden_layers
        if is_int(layers):
            layers = min(layers, LARGEST["num_hidden_layers"] + 1)
            for name in ("layer_types", "mlp_layer_types"):
                pattern = changes.get(name, _period(getattr(self, name)))
                whole = name not in changes or layers % max(len(pattern), 1) == 0
                if isinstance(pattern, tuple) and pattern and whole:
                    changes[name] = tuple(pattern[i % len(pattern)] for i in range(layers))
        if set(changes.get("mlp_layer_types", ())) == {"sparse"}:
            changes["mlp_layer_types"] = ()
        mtp_layers = changes.get("num_mtp_layers")
        if (
            is_int(mtp_layers)
            and 0 <= mtp_layers <= MOST_MTP_LAYERS
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

    def mlp_type(self, layer: int) -> MlpType:
        """Return the MLP of trunk layer ``layer`` (from 0)."""
        return self.mlp_layer_types[layer] if self.mlp_layer_types else "sparse"

    @property
    def has_experts(self) -> bool:
        """True unless every trunk layer is dense; MTP's layer then is dense too."""
        return not self.mlp_layer_types or "sparse" in self.mlp_layer_types

    @property
    def mtp_mlp_type(self) -> MlpType:
        """MLP of the MTP layer."""
        return "sparse" if self.has_experts else "dense"

    @property
    def variant_widths(self) -> dict[str, int]:
        """Inner widths of the MLPs that no released model has, by field; those in use only."""
        widths = {"shared_expert_intermediate_size": self.shared_expert_intermediate_size or 0}
        if "dense" in self.mlp_layer_types:
            widths["intermediate_size"] = self.intermediate_size
        return {field: width for field, width in widths.items() if width}

    @property
    def head_widths(self) -> tuple[int, int]:
        """Width of a head's query and key, and of its value; both `head_dim` as released."""
        latent = self.latent_attention
        return (latent.qk_head_dim, latent.v_head_dim) if latent else (self.head_dim,) * 2

    @property
    def attention_dimensions(self) -> dict[str, int]:
        """Dimensions of the attention's matrices beside `hidden_size`, by the fields that they are
        products of.
        """
        heads, latent = self.num_attention_heads, self.latent_attention
        if latent is not None:
            return latent.dimensions(heads)
        return {
            "num_attention_heads * head_dim": heads * self.head_dim,
            "num_key_value_heads * head_dim": self.num_key_value_heads * self.head_dim,
        }

    @property
    def cached_channels(self) -> int:
        """Numbers that inference keeps of a token in a layer: its keys and values."""
        latent = self.latent_attention
        if latent is not None:  # their latent, and the rotated key that heads share
            return latent.kv_lora_rank + latent.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

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
            # No release has a second layer; its names are ours.
            head = f"mtp.{layer}." if layer else "mtp."
            yield Parameter(
                f"{head}pre_fc_norm_embedding.weight", (hidden,), "norms", layer, mtp=True
            )
            yield Parameter(f"{head}pre_fc_norm_hidden.weight", (hidden,), "norms", layer, mtp=True)
            # Its input is the next token's embedding, then the trunk's hidden state.
            yield Parameter(
                f"{head}fc.weight", (hidden, 2 * hidden), "mtp projection", layer, mtp=True
            )
            yield from self._layer_parameters(f"mtp.layers.{layer}.", layer, mtp=True)
            yield Parameter(f"{head}norm.weight", (hidden,), "norms", layer, mtp=True)

    def _layer_parameters(self, prefix: str, layer: int, *, mtp: bool) -> Iterator[Parameter]:
        hidden, mlp = self.hidden_size, f"{prefix}mlp."
        yield Parameter(f"{prefix}input_layernorm.weight", (hidden,), "norms", layer, mtp=mtp)
        for name, shape, component in self._attention_tensors():
            yield Parameter(f"{prefix}self_attn.{name}", shape, component, layer, mtp=mtp)
        yield Parameter(
            f"{prefix}post_attention_layernorm.weight", (hidden,), "norms", layer, mtp=mtp
        )
        if (self.mtp_mlp_type if mtp else self.mlp_type(layer)) == "dense":
            for name, shape in gated_mlp(mlp, hidden, self.intermediate_size):
                yield Parameter(name, shape, "dense MLP", layer, mtp=mtp)
            return
        yield Parameter(f"{mlp}gate.weight", (self.num_experts, hidden), "router", layer, mtp=mtp)
        for expert in range(self.num_experts):
            for name, shape in gated_mlp(
                f"{mlp}experts.{expert}.", hidden, self.moe_intermediate_size
            ):
                yield Parameter(name, shape, "experts", layer, expert, mtp)
        if self.shared_expert_intermediate_size is not None:
            for name, shape in gated_mlp(
                f"{mlp}shared_expert.", hidden, self.shared_expert_intermediate_size
            ):
                yield Parameter(name, shape, "shared expert", layer, mtp=mtp)

    def _attention_tensors(self) -> Iterator[tuple[str, Shape, Component]]:
        hidden, heads = self.hidden_size, self.num_attention_heads
        if self.latent_attention is not None:
            yield from self.latent_attention.tensors(hidden, heads)
            return
        queries, keys = heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield "q_proj.weight", (queries, hidden), "attention"
        yield "k_proj.weight", (keys, hidden), "attention"
        yield "v_proj.weight", (keys, hidden), "attention"
        yield "o_proj.weight", (hidden, queries), "attention"
        yield "q_norm.weight", (self.head_dim,), "norms"
        yield "k_norm.weight", (self.head_dim,), "norms"

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
        # Each MTP layer's logits come from the shared head, which `parameters` lists once.
        extra_heads = self.num_mtp_layers if mtp else 0
        flops["output head"] += extra_heads * per_weight * self.vocab_size * self.hidden_size
        # Two products (QK^T and PV), a multiply and an add each.
        per_pair = 2 * passes * self.num_attention_heads * sum(self.head_widths)
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
            **self.variant_widths,
            **self.attention_dimensions,
        }
        return {name: size for name, size in dimensions.items() if size % alignment}


def _period(types: tuple[str, ...]) -> tuple[str, ...]:
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
