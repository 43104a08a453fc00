"""Specs of the MLPs that no released model has: a dense layer, and a shared expert.

Modules take and return hidden states `[s, b, h]`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules


def shared_expert(provider: BackendSpecProvider) -> functools.partial[SharedExpertMLP]:
    """Return the spec of an expert that every token uses, its output added to the routed ones'.

    Megatron builds it only if the configuration has `moe_shared_expert_intermediate_size`.
    """
    return functools.partial(
        SharedExpertMLP,
        submodules=MLPSubmodules(
            linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()
        ),
    )


def make_dense(submodules: TransformerLayerSubmodules, provider: BackendSpecProvider) -> None:
    """Put a dense MLP of width `ffn_hidden_size` into a layer's spec, in place of its experts.

    Args:
        submodules: spec of a sparse layer, changed in place.
        provider: classes of the backend's modules.
    """
    fused_norm = provider.fuse_layernorm_and_linear()
    linear_fc1 = (
        provider.column_parallel_layer_norm_linear()
        if fused_norm
        else provider.column_parallel_linear()
    )
    assert linear_fc1 is not None
    submodules.mlp = functools.partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=provider.row_parallel_linear()),
    )
    if fused_norm:
        submodules.pre_mlp_layernorm = IdentityOp
    else:
        # Saved under the name of the te backend's fused norm.
        submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
