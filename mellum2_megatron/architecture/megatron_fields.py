"""The architecture in Megatron's terms: a table of configuration fields and their arguments.

`model.transformer_config` builds Megatron's `TransformerConfig` from the table, or checks a given
one against it. `upstream.arguments` renders the command line from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mellum2_megatron.architecture.mellum2 import Mellum2Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronField:
    """One fact of the architecture as a field of Megatron-Core 0.19.2.

    Attributes:
        name: field of `TransformerConfig`.
        flag: argument of Megatron-LM that sets it.
        value: function from an architecture to the field's value.
        is_switch: true for an argument without a value, given if the field is true; default false.
        inverted: for a switch: true if it is given when the field is false; default false.
    """

    name: str
    flag: str
    value: Callable[[Mellum2Architecture], Any]
    is_switch: bool = False
    inverted: bool = False

    def arguments(self, architecture: Mellum2Architecture) -> list[str]:
        """Return the command-line words that set this field; none if the default does."""
        value = self.value(architecture)
        if self.is_switch:
            return [self.flag] if bool(value) != self.inverted else []
        # Megatron's parser of lists takes no blanks (training/arguments.py, moe_freq_type, 0.19.2).
        return [] if value is None else [self.flag, str(value).replace(" ", "")]


def _switch(
    name: str, flag: str, value: Callable[[Mellum2Architecture], bool], inverted: bool = False
) -> MegatronField:
    return MegatronField(name=name, flag=flag, value=value, is_switch=True, inverted=inverted)


def _value(name: str, flag: str, value: Callable[[Mellum2Architecture], Any]) -> MegatronField:
    return MegatronField(name=name, flag=flag, value=value)


MEGATRON_FIELDS: tuple[MegatronField, ...] = (
    _value("num_layers", "--num-layers", lambda a: a.num_hidden_layers),
    _value("hidden_size", "--hidden-size", lambda a: a.hidden_size),
    _value("num_attention_heads", "--num-attention-heads", lambda a: a.num_attention_heads),
    _value("num_query_groups", "--num-query-groups", lambda a: a.num_key_value_heads),
    _value("kv_channels", "--kv-channels", lambda a: a.head_dim),
    # Unused without dense layers, but it sizes buffers and is checked for divisibility.
    _value("ffn_hidden_size", "--ffn-hidden-size", lambda a: a.intermediate_size),
    _value("normalization", "--normalization", lambda a: "RMSNorm"),
    _value("layernorm_epsilon", "--norm-epsilon", lambda a: a.rms_norm_eps),
    _switch("qk_layernorm", "--qk-layernorm", lambda a: True),
    _switch("gated_linear_unit", "--swiglu", lambda a: True),
    _switch("add_bias_linear", "--disable-bias-linear", lambda a: False, inverted=True),
    _value("init_method_std", "--init-method-std", lambda a: a.initializer_range),
    # Megatron's model without experts has neither their number nor their width.
    _value("num_moe_experts", "--num-experts", lambda a: a.num_experts if a.has_experts else None),
    _value("moe_layer_freq", "--moe-layer-freq", lambda a: sparse_pattern(a)),
    _value(
        "moe_shared_expert_intermediate_size",
        "--moe-shared-expert-intermediate-size",
        lambda a: a.shared_expert_intermediate_size,
    ),
    _value(
        "moe_ffn_hidden_size",
        "--moe-ffn-hidden-size",
        lambda a: a.moe_intermediate_size if a.has_experts else None,
    ),
    _value("moe_router_topk", "--moe-router-topk", lambda a: a.num_experts_per_tok),
    # Softmax over the chosen experts equals softmax over all, renormalised over the chosen. With
    # one expert per token Megatron takes softmax over all only (transformer_config.py:2328,
    # 0.19.2), and `model.router` renormalises.
    _switch(
        "moe_router_pre_softmax",
        "--moe-router-pre-softmax",
        lambda a: not a.norm_topk_prob or a.num_experts_per_tok == 1,
    ),
    _switch(
        "multi_latent_attention",
        "--multi-latent-attention",
        lambda a: a.latent_attention is not None,
    ),
    # No argument for None: Megatron's own default is a model without MTP.
    _value("mtp_num_layers", "--mtp-num-layers", lambda a: a.num_mtp_layers or None),
)
"""Facts that an argument of Megatron-LM sets.

Sliding window and rotation differ by layer; the layer spec sets them (`model.attention`).
"""

FIXED_FIELDS: dict[str, Any] = {
    "add_qkv_bias": False,
    "layernorm_zero_centered_gamma": False,
    "moe_router_score_function": "softmax",
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "rotary_interleaved": False,
}
"""Fields whose Megatron default is Mellum 2's value; another value would be another model."""


def _latent(name: str) -> Callable[[Mellum2Architecture], Any]:
    return lambda architecture: getattr(architecture.latent_attention, name)


LATENT_FIELDS: tuple[MegatronField, ...] = (
    _value("q_lora_rank", "--q-lora-rank", _latent("q_lora_rank")),
    _value("kv_lora_rank", "--kv-lora-rank", _latent("kv_lora_rank")),
    _value("qk_head_dim", "--qk-head-dim", _latent("qk_nope_head_dim")),
    _value("qk_pos_emb_head_dim", "--qk-pos-emb-head-dim", _latent("qk_rope_head_dim")),
    _value("v_head_dim", "--v-head-dim", _latent("v_head_dim")),
    # The other type, "yarn", is one YaRN for all layers. Each layer brings its own angles.
    _value("rope_type", "--rope-type", lambda a: "rope"),
)
"""Facts of latent attention, fields of Megatron's `MLATransformerConfig`."""


def megatron_fields(architecture: Mellum2Architecture) -> tuple[MegatronField, ...]:
    """Return the fields that describe this model: `MEGATRON_FIELDS` unless it is a variant."""
    if architecture.latent_attention is None:
        return MEGATRON_FIELDS
    # Megatron takes groups of queries and latent attention for two models that exclude each other.
    shared = (field for field in MEGATRON_FIELDS if field.name != "num_query_groups")
    return (*shared, *LATENT_FIELDS)


def architecture_arguments(architecture: Mellum2Architecture) -> list[str]:
    """Return the arguments of Megatron-LM that describe this model.

    Together with the layer spec (`model.layer_specs`) they determine the model. All other
    arguments concern training.
    """
    words = ["--untie-embeddings-and-output-weights"]
    if architecture.latent_attention is None:
        words.append("--group-query-attention")
    else:
        # Megatron's fused rotation of latent attention takes one YaRN for all layers, and its
        # configuration refuses it without (core/transformer/transformer_config.py:2966, 0.19.2).
        words.append("--no-rope-fusion")
    for field in megatron_fields(architecture):
        words += field.arguments(architecture)
    theta = architecture.rope_sliding_attention.rope_theta
    # Megatron's shared angles. Each layer replaces them by its own, so the base has no effect.
    words += ["--position-embedding-type", "rope", "--rotary-base", str(int(theta))]
    words += ["--attention-dropout", "0.0", "--hidden-dropout", "0.0"]
    window = window_size(architecture)
    # For Megatron's own code, such as its stock MTP layer. Our layers take their window from the
    # layer spec (`model.attention`).
    if window is not None:
        words += [
            "--window-size",
            f"{window[0]},{window[1]}",
            "--window-attn-skip-freq",
            window_pattern(architecture),
        ]
    return words


def sparse_pattern(architecture: Mellum2Architecture) -> int | list[int]:
    """Return the value of ``--moe-layer-freq``: 1 if all layers are alike, else a list.

    In the list 1 stands for a sparse layer and 0 for a dense one.
    """
    types = architecture.mlp_layer_types
    if len(set(types)) < 2:
        return 1
    return [int(kind == "sparse") for kind in types]


def window_size(architecture: Mellum2Architecture) -> tuple[int, int] | None:
    """Return Megatron's window ``(keys before the query, keys after it)``; None if no layer slides.

    Hugging Face counts the query among the ``sliding_window`` keys, Megatron does not: 1,024
    becomes ``(1023, 0)``.
    """
    if "sliding_attention" not in (*architecture.layer_types, *architecture.mtp_layer_types):
        return None
    assert architecture.sliding_window is not None  # required of sliding layers
    return architecture.sliding_window - 1, 0


def window_pattern(architecture: Mellum2Architecture) -> str:
    """Return the value of ``--window-attn-skip-freq``.

    It is the period n if every n-th layer is full, else a list of 1 (sliding) and 0 (full).
    """
    sliding = [layer_type == "sliding_attention" for layer_type in architecture.layer_types]
    # From 2: a period of 1 would make every layer full.
    for period in range(2, len(sliding) + 1):
        if sliding == [number % period != 0 for number in range(1, len(sliding) + 1)]:
            return str(period)
    return "[" + ",".join("1" if slides else "0" for slides in sliding) + "]"
