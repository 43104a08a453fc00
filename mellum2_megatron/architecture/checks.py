"""The values that a Mellum 2 model can have: types of layers, largest sizes, and their rules."""

from __future__ import annotations

from typing import Any, Literal, get_args

from mellum2_megatron.common.errors import InputError, nearest, shown
from mellum2_megatron.common.field_checks import (
    INT32_MAX,
    divisors,
    is_int,
    is_number,
    require,
    require_positive_int,
    require_positive_number,
)

LayerType = Literal["sliding_attention", "full_attention"]
MlpType = Literal["sparse", "dense"]

LARGEST = {
    "vocab_size": INT32_MAX,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "moe_intermediate_size": 2**24,
    "num_experts": 2**16,
    "num_experts_per_tok": 2**16,
    "max_position_embeddings": INT32_MAX,
}
"""Size of a model -> largest value; far beyond any model, so that counting stays quick."""
MOST_MTP_LAYERS = 4
"""Largest number of multi-token-prediction layers; Megatron itself has no limit."""
_MOST_EXPERTS = 2**17
"""Largest number of experts in all layers; every expert is listed when a model is counted."""


def check_architecture(model: Any) -> None:
    """Refuse values that no Mellum 2 model can have.

    Args:
        model: a `Mellum2Architecture`, which imports this module; its values may have any type yet.

    Raises:
        InputError: the first such value, by the name of its field.
    """
    for name, most in LARGEST.items():
        require_positive_int(name, getattr(model, name), most=most)
    require(
        model.num_hidden_layers * model.num_experts <= _MOST_EXPERTS,
        f"num_experts={model.num_experts} with num_hidden_layers={model.num_hidden_layers}",
        rule=f"all layers together must not have more than {_MOST_EXPERTS:,} experts",
        fix="lower one of the two",
    )
    require_positive_number("rms_norm_eps", model.rms_norm_eps, least=1e-37, most=1.0)
    require_positive_number("initializer_range", model.initializer_range, most=10.0)
    require(
        is_number(model.router_aux_loss_coef) and 0 <= model.router_aux_loss_coef <= 1000,
        f"router_aux_loss_coef={shown(model.router_aux_loss_coef)}",
        rule="it must be 0 to 1000",
        fix="use 0.001",
    )
    require(
        isinstance(model.norm_topk_prob, bool),
        f"norm_topk_prob={model.norm_topk_prob!r}",
        rule="it must be true or false",
        fix="use true",
    )
    require(
        model.num_attention_heads % model.num_key_value_heads == 0,
        f"num_key_value_heads={model.num_key_value_heads}",
        rule=f"it must divide num_attention_heads ({model.num_attention_heads})",
        fix=f"use one of {divisors(model.num_attention_heads)}",
    )
    require(
        model.head_dim % 2 == 0,
        f"head_dim={model.head_dim}",
        rule="RoPE rotates pairs, so it must be even",
        fix="use an even head_dim",
    )
    require(
        model.num_experts_per_tok <= model.num_experts,
        f"num_experts_per_tok={model.num_experts_per_tok}",
        rule=f"a token cannot use more than num_experts ({model.num_experts}) experts",
        fix=f"use at most {model.num_experts}",
    )
    _check_layers(model)
    # Types only: transformers merely warns of an id outside the vocabulary, and released
    # folders hold such ids.
    eos = model.eos_token_id if isinstance(model.eos_token_id, tuple) else (model.eos_token_id,)
    for name, value in (
        ("bos_token_id", model.bos_token_id),
        ("pad_token_id", model.pad_token_id),
        *(("eos_token_id", token) for token in eos),
    ):
        require(
            value is None or (is_int(value) and abs(value) <= INT32_MAX),
            f"{name}={shown(value)}",
            rule="a token id is a whole number of 32 bits",
            fix="use an id or null",
        )


def _check_layers(model: Any) -> None:
    """Refuse layer types that are unknown or do not match the numbers of layers."""
    require(
        is_int(model.num_mtp_layers) and 0 <= model.num_mtp_layers <= MOST_MTP_LAYERS,
        f"num_mtp_layers={shown(model.num_mtp_layers)}",
        rule=f"a model has 0 to {MOST_MTP_LAYERS} multi-token-prediction layers",
        fix="use 1, as released",
    )
    attention, layers = get_args(LayerType), model.num_hidden_layers
    # An empty list of MLPs stands for as many sparse ones.
    mlps = layers if model.mlp_layer_types else 0
    for name, types, known, counted, count in (
        ("layer_types", model.layer_types, attention, "num_hidden_layers", layers),
        ("mlp_layer_types", model.mlp_layer_types, get_args(MlpType), "num_hidden_layers", mlps),
        (
            "mtp_layer_types",
            model.mtp_layer_types,
            attention,
            "num_mtp_layers",
            model.num_mtp_layers,
        ),
    ):
        require(
            isinstance(types, tuple),
            f"{name}={types!r}",
            rule="it must be a tuple of layer types",
            fix="give a tuple",
        )
        for value in types:
            if value not in known:
                raise InputError(
                    f"{name} entry {value!r}",
                    rule=f"a layer is {' or '.join(known)}",
                    fix=nearest(str(value), known),
                )
        require(
            len(types) == count,
            f"{name} with {len(types)} entries",
            rule=f"it must have one entry per layer ({counted}={count})",
            fix=f"give {count} entries, or change {counted} to {len(types)}",
        )
    if model.shared_expert_intermediate_size is not None:
        require_positive_int(
            "shared_expert_intermediate_size",
            model.shared_expert_intermediate_size,
            most=LARGEST["intermediate_size"],
        )
        require(
            model.has_experts,
            f"shared_expert_intermediate_size={model.shared_expert_intermediate_size}",
            rule="it lies beside routed experts, and every layer is dense",
            fix="use null, or make a layer sparse",
        )
    if model.sliding_window is not None:
        require_positive_int("sliding_window", model.sliding_window)
    else:
        require(
            "sliding_attention" not in model.layer_types + model.mtp_layer_types,
            "sliding_window=None",
            rule="a sliding_attention layer needs its window",
            fix="use e.g. 1024",
        )
