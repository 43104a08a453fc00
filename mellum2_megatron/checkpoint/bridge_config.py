"""``run_config.yaml``: the description of a checkpoint's model for Megatron-Bridge and NeMo-RL.

Both read it from the checkpoint's iteration folder
(megatron/bridge/training/utils/checkpoint_utils.py:131, 0.6.2) and build the class named in its
``model`` section: `conversion.bridge.model.Mellum2ModelProvider`. Without the file Bridge falls
back to Megatron-LM's own arguments, which have neither layer-selective rotation nor this MTP head.
The file must not lie beside the iteration folders, because Bridge takes any folder that holds it
for an iteration (line 236).

The file has plain values only, so writing it needs neither Bridge nor torch.
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
"""Class that Bridge imports by this name; this package may not import `conversion`."""

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": None}
"""Dtype of the weights -> the boolean field of Megatron's configuration that selects it."""


def provider_fields(architecture: Mellum2Architecture) -> dict[str, Any]:
    """Return the fields of this model's provider as YAML values.

    They are fields of Megatron's `TransformerConfig` and of Bridge's `GPTModelProvider`
    (megatron/bridge/models/gpt_provider.py, 0.6.2). `run_config` adds dtypes and the activation
    function, which YAML can only refer to.
    """
    fields: dict[str, Any] = {field.name: field.value(architecture) for field in MEGATRON_FIELDS}
    fields |= FIXED_FIELDS
    fields |= {
        "architecture": architecture.to_dict(),
        "vocab_size": architecture.vocab_size,
        "seq_length": architecture.max_position_embeddings,
        "share_embeddings_and_output_weights": False,
        # Megatron's shared angles; each layer replaces them by its own (model/attention.py).
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
        # Defaults of Megatron-LM's arguments (megatron/training/arguments.py, 0.19.2).
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "persist_layer_norm": True,
        "cross_entropy_loss_fusion": False,
        # The only context parallelism of Transformer Engine that handles a sliding window with
        # four key-value heads (transformer_engine/pytorch/attention/dot_product_attention/
        # context_parallel.py:5688, 2.20.2).
        "cp_comm_type": "all_gather",
    }
    window = window_size(architecture)
    if window is not None:
        fields["window_size"] = list(window)
        # Text for Megatron's command line, here as a value: a period, or a list of 0 and 1.
        fields["window_attn_skip_freq"] = json.loads(window_pattern(architecture))
    return fields


def run_config(architecture: Mellum2Architecture, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the content of ``run_config.yaml`` for a checkpoint of this model.

    A ``torch_dist`` checkpoint fits every layout, so parallel sizes are 1. The checkpoint is
    declared as weights only: Bridge must not resume from our optimizer and random state.

    Args:
        architecture: the model in the checkpoint.
        dtype: dtype of the weights: bfloat16 (default), float16 or float32.

    Raises:
        InputError: `dtype` is no training dtype.
    """
    if dtype not in _DTYPES:
        raise InputError(
            f"dtype={dtype!r}", rule=f"must be one of {', '.join(_DTYPES)}", fix="use bfloat16"
        )
    model: dict[str, Any] = {"_target_": PROVIDER} | provider_fields(architecture)
    for switch in filter(None, _DTYPES.values()):
        model[switch] = switch == _DTYPES[dtype]
    model |= {
        "params_dtype": _reference(f"torch.{dtype}"),
        "activation_func": _reference("torch.nn.functional.silu"),
    }
    model |= {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    # Same sections as in Bridge's own save of weights only, with the same nulls
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
    """Write ``run_config.yaml`` into a checkpoint's iteration folder, in one step.

    Raises:
        InputError: `dtype` is no training dtype.
    """
    text = yaml.safe_dump(
        run_config(architecture, dtype), sort_keys=False, default_flow_style=False
    )
    write_text(folder / RUN_CONFIG_FILE, text)


def _reference(name: str) -> dict[str, Any]:
    """Return the mapping that Bridge resolves to the named object, without calling it."""
    return {"_target_": name, "_call_": False}
