"""Megatron's `TransformerConfig` of an architecture, and the check that a given one matches it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from mellum2_megatron.architecture.megatron_fields import (
    FIXED_FIELDS,
    megatron_fields,
    window_pattern,
    window_size,
)
from mellum2_megatron.common.errors import InputError

if TYPE_CHECKING:
    from mellum2_megatron.architecture import Mellum2Architecture


def transformer_config(architecture: Mellum2Architecture, **overrides: Any) -> TransformerConfig:
    """Return the Megatron configuration of this model, for building it outside of `pretrain`.

    Args:
        architecture: the model's description.
        **overrides: further fields of `TransformerConfig`, such as parallel sizes, precision,
            dispatcher or losses.
    """
    fields: dict[str, Any] = {
        field.name: field.value(architecture) for field in megatron_fields(architecture)
    }
    # Fused kernels are off, because they need Transformer Engine, Apex or a GPU.
    fields |= {
        "activation_func": torch.nn.functional.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
    }
    config_class = (
        TransformerConfig if architecture.latent_attention is None else MLATransformerConfig
    )
    config = config_class(**fields | overrides)
    use_plain_initialization(config)
    return config


def use_plain_initialization(config: TransformerConfig) -> None:
    """Initialise output projections like all other matrices: normal with `init_method_std`.

    Megatron divides their deviation by `sqrt(2 * num_layers)` and has no argument against it
    (megatron/core/transformer/transformer_config.py, `scaled_init_method_normal`, 0.19.2). The
    released `config.json` has one deviation, `initializer_range` 0.02.
    """
    config.output_layer_init_method = config.init_method


def keep_mtp_projection_in_bf16(config: TransformerConfig) -> None:
    """Exempt the MTP layer's `eh_proj` `[h, 2 h]` from FP8.

    This is Megatron's per-module precision: the module's linear layer opens a disabled FP8 context
    (megatron/core/extensions/transformer_engine.py:312-330 and 1065, 0.19.2). Megatron's command
    line reaches it through a file only (`--te-precision-config-file`).
    """
    from megatron.core.quantization.quant_config import GlobMatcher, RecipeConfig

    # An empty recipe means no FP8.
    recipe = {"transformer_engine_config_type": "TEQuantizationParams", "training_recipe": {}}
    config.quant_recipe = RecipeConfig([GlobMatcher("*.eh_proj", "bf16")], {"bf16": recipe})


def complete_config(config: TransformerConfig, architecture: Mellum2Architecture) -> None:
    """Set the window and QK-norm on `config` where the command line left Megatron's default.

    The configuration is shared by the whole model. A stock MTP layer, which Megatron's own builder
    adds beside our decoder (megatron/training/models/gpt.py:387-414, 0.19.2), therefore slides too.
    """
    if config.window_size is None and (window := window_size(architecture)) is not None:
        config.window_size = window
        pattern = window_pattern(architecture)
        config.window_attn_skip_freq = int(pattern) if pattern.isdigit() else json.loads(pattern)
    # A stock MTP layer chose its norms before this call: with MTP the command line must give
    # --qk-layernorm, and `config_differences` names it.
    if not config.mtp_num_layers:
        config.qk_layernorm = True


def config_differences(config: TransformerConfig, architecture: Mellum2Architecture) -> list[str]:
    """Return a line for each field of `config` that contradicts `architecture`: name, value, fix.

    A window that the command line leaves out is no difference: `complete_config` sets it.
    """
    lines = []
    for field in megatron_fields(architecture):
        # Latent attention has fields that Megatron's plain configuration has not.
        want, have = field.value(architecture), getattr(config, field.name, None)
        if (have or None) != (want or None):  # None, 0 and False mean the same
            words = " ".join(field.arguments(architecture)) or f"no {field.flag}"
            lines.append(f"{field.name} is {have!r}, needs {want!r} ({words})")
    for name, want in FIXED_FIELDS.items():
        have = getattr(config, name)
        if have != want:
            lines.append(f"{name} is {have!r}, needs {want!r} (Megatron's default)")
    if config.gated_linear_unit and config.activation_func is not torch.nn.functional.silu:
        lines.append(f"activation_func is {config.activation_func!r}, needs SiLU (--swiglu)")
    window = window_size(architecture)
    if config.window_size is not None and (window is None or tuple(config.window_size) != window):
        words = "no --window-size" if window is None else f"--window-size {window[0]},{window[1]}"
        lines.append(f"window_size is {config.window_size!r}, needs {window!r} ({words})")
    return lines


def require_matching_config(config: TransformerConfig, architecture: Mellum2Architecture) -> None:
    """Refuse a `config` that describes another model than `architecture`.

    Raises:
        InputError: they differ; all differing fields are named.
    """
    differences = config_differences(config, architecture)
    if differences:
        raise InputError(
            "Megatron's arguments",
            rule="must describe the layer spec's model; " + "; ".join(differences),
            fix="give the arguments named, or choose the layer spec of the intended model",
        )
