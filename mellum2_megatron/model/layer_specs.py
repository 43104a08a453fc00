"""Megatron ModuleSpecs of Mellum 2 for two backends with the same checkpoint keys.

- `te`: Transformer Engine's layers, with fused norm and projection, grouped GEMM and its attention.
  For production.
- `torch`: plain PyTorch modules on any device. The reference, and the backend of a machine without
  a GPU.

For a stock Megatron-LM command line this module ends with one layer spec for each preset and
backend, under a plain name::

    --spec mellum2_megatron.model.layer_specs mellum2_12b            # te
    --spec mellum2_megatron.model.layer_specs mellum2_12b_torch
    --spec mellum2_megatron.model.layer_specs mellum2_12b_128k       # with layer-selective YaRN

Modules take and return hidden states `[s, b, h]`; the letters of shapes are in
`mellum2_megatron/model/__init__.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from mellum2_megatron.architecture import PRESETS, LayerType, Mellum2Architecture, MlpType
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.model.attention import Mellum2SelfAttention
from mellum2_megatron.model.core_attention import TorchCoreAttention
from mellum2_megatron.model.latent_attention import put_latent_attention
from mellum2_megatron.model.mlp_variants import make_dense, shared_expert
from mellum2_megatron.model.norm import TorchRMSNorm
from mellum2_megatron.model.router import Mellum2Router
from mellum2_megatron.model.router_variants import router_class
from mellum2_megatron.model.transformer_layer import Mellum2TransformerLayer

if TYPE_CHECKING:
    from mellum2_megatron.config import Backend


class TorchSpecProvider(LocalSpecProvider):
    """Megatron's local modules with our norm and our core attention."""

    def layer_norm(
        self, rms_norm: bool = True, for_qk: bool = False, has_residual: bool = False
    ) -> type[TorchRMSNorm]:
        """Return the norm of hidden states `[s, b, h]` and of queries and keys `[s, b, n, d]`."""
        return TorchRMSNorm

    def core_attention(self) -> type[TorchCoreAttention]:
        """Return the attention with window, documents and grouped keys."""
        return TorchCoreAttention


def spec_provider(backend: Backend) -> BackendSpecProvider:
    """Return the provider of a backend's module classes.

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
            fix="install the 'te' extra on a machine with a GPU (docs/install.md), "
            "or choose backend=torch",
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def layer_spec(
    architecture: Mellum2Architecture,
    backend: Backend,
    *,
    layer_types: Sequence[LayerType] | None = None,
    router: type[Mellum2Router] = Mellum2Router,
    mlp: MlpType = "sparse",
) -> ModuleSpec:
    """Return the spec of one transformer layer, the same for all layers of a stack with its MLP.

    The attention type is chosen when a layer is built, by its number.

    Args:
        architecture: the model's description.
        backend: "te" for Transformer Engine's modules, "torch" for plain ones.
        layer_types: attention types of the layer's stack; the decoder's if None.
        router: class of the router; default the released model's.
        mlp: "sparse" (default) for a mixture of experts, as in every released layer, or "dense".
    """
    provider = spec_provider(backend)
    fused_norm = provider.fuse_layernorm_and_linear()
    norm = provider.layer_norm(rms_norm=True, has_residual=True)
    # Transformer Engine fuses the norm of the hidden state into the projection, not the norms of
    # the heads' queries and keys.
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
                shared_experts=shared_expert(provider),
                router=functools.partial(router, norm_topk_prob=architecture.norm_topk_prob),
                experts=provider.grouped_mlp_modules(True),
            ),
        ),
        mlp_bda=get_bias_dropout_add,
    )
    if not fused_norm:
        submodules.input_layernorm = norm
        # Saved under the name of the te backend's fused norm. Megatron's local spec renames the
        # pre-MLP norm too (megatron/core/models/gpt/gpt_layer_specs.py:459-462, 0.19.2), though
        # the te spec with experts does not fuse that norm.
        submodules.sharded_state_dict_keys_map = {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
        }
    if architecture.latent_attention is not None:
        put_latent_attention(
            submodules, provider, architecture, layer_types or architecture.layer_types
        )
    if mlp == "dense":
        make_dense(submodules, provider)
    return ModuleSpec(module=Mellum2TransformerLayer, submodules=submodules)


def decoder_block_spec(
    architecture: Mellum2Architecture,
    backend: Backend,
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Return the spec of this pipeline stage's decoder layers and of the final norm.

    Args:
        architecture: the model's description.
        backend: "te" for Transformer Engine's modules, "torch" for plain ones.
        config: the model's configuration, for its pipeline layout.
        vp_stage: virtual pipeline stage, or None without virtual stages.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    router = router_class(config)
    specs = {
        mlp: layer_spec(architecture, backend, router=router, mlp=mlp)
        for mlp in map(architecture.mlp_type, layers)
    }
    return TransformerBlockSubmodules(
        layer_specs=[specs[architecture.mlp_type(layer)] for layer in layers],
        layer_norm=spec_provider(backend).layer_norm(rms_norm=True),
    )


def mtp_block_spec(
    architecture: Mellum2Architecture,
    backend: Backend,
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the spec of the MTP block; None on a pipeline stage, or in a model, without it.

    The arguments are those of `decoder_block_spec`.
    """
    if not architecture.num_mtp_layers:
        return None
    layer = layer_spec(
        architecture,
        backend,
        layer_types=architecture.mtp_layer_types,
        router=router_class(config),
        mlp=architecture.mtp_mlp_type,
    )
    return get_gpt_mtp_block_spec_for_backend(
        config,
        # A bare spec is accepted for Megatron's own layer class only, a block for any
        # (megatron/core/models/gpt/gpt_layer_specs.py:767-773, 0.19.2).
        TransformerBlockSubmodules(layer_specs=[layer]),
        spec_provider(backend),
        vp_stage=vp_stage,
    )


# For Megatron-LM's `--spec`, which looks the name up in the module's `vars()`
# (megatron/core/transformer/spec_utils.py:42-55, 0.19.2): a module `__getattr__` would not do.
mellum2_12b_torch = layer_spec(PRESETS["mellum2-12b"], "torch")
mellum2_12b_128k_torch = layer_spec(PRESETS["mellum2-12b-128k"], "torch")
mellum2_tiny_torch = layer_spec(PRESETS["mellum2-tiny"], "torch")
if HAVE_TE:
    mellum2_12b = layer_spec(PRESETS["mellum2-12b"], "te")
    mellum2_12b_128k = layer_spec(PRESETS["mellum2-12b-128k"], "te")
    mellum2_tiny = layer_spec(PRESETS["mellum2-tiny"], "te")
