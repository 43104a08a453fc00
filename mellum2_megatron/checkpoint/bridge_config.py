"""``run_config.yaml``: how Megatron-Bridge and NeMo-RL learn what model a Megatron checkpoint
holds.

Both look for it inside a checkpoint's iteration folder
(megatron/bridge/training/utils/checkpoint_utils.py:131, 0.6.2) and build the class that its
``model`` section names, here `conversion.bridge.model.Mellum2ModelProvider`. Without the file
Bridge falls back to Megatron-LM's own arguments, which know neither the layer-selective rotation
nor this MTP head. It is not written beside the iteration folders: a folder that holds it counts as
an iteration itself (line 236).

Plain values only; neither Bridge nor torch is needed to write it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mellum2_megatron.architecture.megatron_fields import (
    FIXED_FIELDS,
    MEGATRON_FIELDS,
    window_pattern,
    window_size,
)
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_text

if TYPE_CHECKING:
    from mellum2_megatron.architecture import Mellum2Architecture

RUN_CONFIG_FILE = "run_config.yaml"
PROVIDER = "conversion.bridge.model.Mellum2ModelProvider"

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": None}
"""Dtype of the weights -> the switch of Megatron's configuration that goes with it."""


def provider_fields(architecture: Mellum2Architecture) -> dict[str, Any]:
    """Return what the provider of this model is made from: fields of Megatron's `TransformerConfig`
    and of Bridge's `GPTModelProvider` (megatron/bridge/models/gpt_provider.py, 0.6.2), as YAML
    values.

    Dtypes and the activation function are not among them; they are references, not values.
    """
    fields: dict[str, Any] = {
        field.name: field.value(architecture) for field in MEGATRON_FIELDS
    } | FIXED_FIELDS
    fields |= {
        "architecture": architecture.to_dict(),
        "vocab_size": architecture.vocab_size,
        "seq_length": architecture.max_position_embeddings,
        "share_embeddings_and_output_weights": False,
        # The model's shared angles; each layer replaces them by its own (model/attention.py).
        "position_embedding_type": "rope",
        "rotary_base": int(architecture.rope_sliding_attention.rope_theta),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": architecture.router_aux_loss_coef,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
        # As Megatron-LM's arguments have them by default (megatron/training/arguments.py, 0.19.2).
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "persist_layer_norm": True,
        "cross_entropy_loss_fusion": False,
        # The one way of context parallelism that Transformer Engine has for sliding windows and
        # four key-value heads
        # (transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py:5688,
        # 2.20.2).
        "cp_comm_type": "all_gather",
    }
    window = window_size(architecture)
    if window is not None:
        fields["window_size"] = list(window)
        fields["window_attn_skip_freq"] = json.loads(
            window_pattern(architecture)
        )  # a period, or a list
    return fields


def run_config(architecture: Mellum2Architecture, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the content of ``run_config.yaml`` for a checkpoint of this model.

    A ``torch_dist`` checkpoint is free of any layout, so parallel sizes are 1. It is offered as
    weights alone: Bridge is told that there is neither optimizer nor random state to resume from.

    Args:
        architecture: the model that the checkpoint holds.
        dtype: of its weights.

    Raises:
        InputError: `dtype` is no training dtype.
    """
    if dtype not in _DTYPES:
        raise InputError(
            f"dtype={dtype!r}", rule=f"must be one of {', '.join(_DTYPES)}", fix="use bfloat16"
        )
    model: dict[str, Any] = {"_target_": PROVIDER} | provider_fields(architecture)
    model |= {name: _DTYPES[dtype] == name for name in _DTYPES.values() if name is not None}
    model |= {
        "params_dtype": _reference(f"torch.{dtype}"),
        "activation_func": _reference("torch.nn.functional.silu"),
    }
    model |= {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    # What Bridge's own save of bare weights writes
    # (megatron/bridge/training/model_load_save.py:580-604, 0.6.2).
    return {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": model,
        "checkpoint": {
            "_target_": "megatron.bridge.training.config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            "save_optim": False,
            "save_rng": False,
            "fully_parallel_save": True,
        },
        "logger": {"_target_": "megatron.bridge.training.config.LoggerConfig"},
    } | dict.fromkeys(("train", "optimizer", "ddp", "scheduler", "dataset", "tokenizer", "dist"))


def write_run_config(
    folder: Path, architecture: Mellum2Architecture, dtype: str = "bfloat16"
) -> None:
    """Write ``run_config.yaml`` into a checkpoint's iteration folder, at once or not at all.

    Raises:
        InputError: `dtype` is no training dtype.
    """
    text = yaml.safe_dump(
        run_config(architecture, dtype), sort_keys=False, default_flow_style=False
    )
    write_text(folder / RUN_CONFIG_FILE, text)


def _reference(name: str) -> dict[str, Any]:
    """Return what Bridge resolves to the object of that name, without calling it."""
    return {"_target_": name, "_call_": False}
