"""Megatron ModuleSpecs of Mellum 2 for two backends with the same checkpoint keys.

- `te`: Transformer Engine layers, fused norm + projection, grouped GEMM, TE attention. The
  production path.
- `torch`: plain PyTorch modules, on any device. The reference, and the path of a machine without a
  GPU.

Besides the functions, this module holds one layer spec for each preset and backend under a plain
name, for a stock Megatron-LM command line::

    --spec mellum2_megatron.model.layer_specs mellum2_12b            # te
    --spec mellum2_megatron.model.layer_specs mellum2_12b_torch
    --spec mellum2_megatron.model.layer_specs mellum2_12b_128k       # with layer-selective YaRN

Megatron looks the name up in the module's `vars()` (megatron/core/transformer/spec_utils.py:42-55,
0.19.2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from mellum2_megatron.architecture import PRESETS, LayerType, Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.model.attention import Mellum2SelfAttention
from mellum2_megatron.model.core_attention import TorchCoreAttention
from mellum2_megatron.model.norm import TorchRMSNorm
from mellum2_megatron.model.router import Mellum2Router
from mellum2_megatron.model.transformer_layer import Mellum2TransformerLayer

Backend = Literal["te", "torch"]


class TorchSpecProvider(LocalSpecProvider):
    """Megatron's local modules with our norm and our core attention."""

    def layer_norm(
        self, rms_norm: bool = True, for_qk: bool = False, has_residual: bool = False
    ) -> type[TorchRMSNorm]:
        """Return the norm of the hidden state, or of one head's queries and keys."""
        return TorchRMSNorm

    def core_attention(self) -> type[TorchCoreAttention]:
        """Return the attention with window, mask and grouped keys."""
        return TorchCoreAttention


def spec_provider(backend: Backend) -> BackendSpecProvider:
    """Return the provider of a backend's modules.

    Raises:
        InputError: unknown backend, or `te` where Transformer Engine cannot be imported.
    """
    if backend == "torch":
        return TorchSpecProvider()
    if backend != "te":
        raise InputError(
            f"backend={backend!r}",
            rule="the backends are 'te' and 'torch'",
            fix="choose one of them",
        )
    if not HAVE_TE:
        raise InputError(
            "backend='te'",
            rule="Transformer Engine cannot be imported here",
            fix="install the 'te' extra on a machine with a GPU (docs/install.md), or choose backend=torch",
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def layer_spec(
    architecture: Mellum2Architecture,
    backend: Backend,
    *,
    layer_types: Sequence[LayerType] | None = None,
) -> ModuleSpec:
    """Return the spec of one transformer layer; the layer's number selects its attention type when
    it is built.

    Args:
        architecture: the model's description.
        backend: whose modules.
        layer_types: attention types of the stack that the layer stands in; the decoder's if None.
    """
    provider = spec_provider(backend)
    fused_norm = provider.fuse_layernorm_and_linear()
    norm = provider.layer_norm(rms_norm=True, has_residual=True)
    qk_norm = provider.layer_norm(rms_norm=True, for_qk=True)
    submodules = TransformerLayerSubmodules(
        self_attention=ModuleSpec(
            module=Mellum2SelfAttention,
            params={
                "attn_mask_type": AttnMaskType.causal,
                "architecture": architecture,
                "layer_types": tuple(layer_types or architecture.layer_types),
            },
            submodules=SelfAttentionSubmodules(
                linear_qkv=(
                    provider.column_parallel_layer_norm_linear()
                    if fused_norm
                    else provider.column_parallel_linear()
                ),
                core_attention=provider.core_attention(),
                linear_proj=provider.row_parallel_linear(),
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=functools.partial(
            MoELayer,
            submodules=MoESubmodules(
                router=Mellum2Router, experts=provider.grouped_mlp_modules(True)
            ),
        ),
        mlp_bda=get_bias_dropout_add,
    )
    if not fused_norm:
        submodules.input_layernorm = norm
        # Saved under the name that the fused norm of the te backend has. Megatron's local spec
        # renames the pre-MLP norm too (megatron/core/models/gpt/gpt_layer_specs.py:459-462,
        # 0.19.2), which its te spec does not.
        submodules.sharded_state_dict_keys_map = {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
        }
    return ModuleSpec(module=Mellum2TransformerLayer, submodules=submodules)


def decoder_block_spec(
    architecture: Mellum2Architecture,
    backend: Backend,
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Return the spec of the decoder layers that this pipeline stage holds, with the final norm."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(architecture, backend)] * layers,
        layer_norm=spec_provider(backend).layer_norm(rms_norm=True),
    )


def mtp_block_spec(
    architecture: Mellum2Architecture,
    backend: Backend,
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the spec of the multi-token-prediction block, or None on a stage (or in a model)
    without it."""
    if not architecture.num_mtp_layers:
        return None
    layer = layer_spec(architecture, backend, layer_types=architecture.mtp_layer_types)
    return get_gpt_mtp_block_spec_for_backend(
        config,
        TransformerBlockSubmodules(
            layer_specs=[layer]
        ),  # the form in which a subclass of its layer is accepted
        spec_provider(backend),
        vp_stage=vp_stage,
    )


def _named_specs() -> dict[str, ModuleSpec]:
    specs = {}
    for preset, architecture in PRESETS.items():
        name = preset.replace("-", "_")
        specs[f"{name}_torch"] = layer_spec(architecture, "torch")
        if HAVE_TE:
            specs[name] = layer_spec(architecture, "te")
    return specs


globals().update(_named_specs())
