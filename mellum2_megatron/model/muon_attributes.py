"""Attributes of a model's weights that Megatron's Muon reads.

Nothing of the optimizer is replaced. Megatron decides by attributes of each weight, read before and
after DistributedDataParallel wraps the model (megatron/core/optimizer/, 0.19.2):

- ``is_embedding_or_output_parameter``: Adam updates the weight, whatever its shape
  (emerging_optimizers.py:128, layer_wise_optimizer.py:38);
- ``is_qkv`` and ``qkv_split_shapes``: blocks of rows that are orthogonalised one by one
  (emerging_optimizers.py:294).

Shapes of weights are `[out, in]`, as `torch.nn.Linear` stores them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mellum2_megatron.common.errors import InputError

if TYPE_CHECKING:
    import torch

    from mellum2_megatron.config import Optimizer


def mark_parameters(model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Mark a model's weights; call it before DistributedDataParallel wraps the model.

    Args:
        model: a `GPTModel`, or one pipeline stage of it.
        optimizer: optimizer settings; ``muon_router``, ``muon_mtp_projection`` and
            ``muon_split_gate_up`` take effect here.
    """
    if optimizer.name != "muon":
        return
    to_adam = [".router."] * (not optimizer.muon_router) + [".eh_proj."] * (
        not optimizer.muon_mtp_projection
    )
    for name, parameter in model.named_parameters():
        if any(part in name for part in to_adam):
            parameter.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
        elif ".linear_fc1.weight" in name and optimizer.muon_split_gate_up:
            # The rows are [gate; up] of this rank, also under expert tensor parallelism
            # (megatron/core/transformer/mlp.py, 0.19.2). Megatron has one mechanism for blocks of
            # rows, and it is named after attention.
            parameter.is_qkv = True  # type: ignore[attr-defined]
            parameter.qkv_split_shapes = [parameter.shape[0] // 2] * 2  # type: ignore[attr-defined]
        elif name.endswith(".linear_kv_up_proj.weight"):
            # Latent attention: a head's rows are its key without rotation, then its value. Keys and
            # values are two matrices, as in grouped-query attention; the other weights are one.
            config: Any = model.config
            parameter.is_qkv = True  # type: ignore[attr-defined]
            parameter.qkv_split_shapes = [config.qk_head_dim, config.v_head_dim]  # type: ignore[attr-defined]


def require_muon_matrices(config: Any, model_chunks: Any) -> None:
    """Refuse weights that Megatron would silently update in another way.

    Args:
        config: Megatron's OptimizerConfig.
        model_chunks: the model's chunks on this rank.

    Raises:
        InputError: a weight with more than two dimensions, which Adam would update; or fused Q, K
            and V that are not whole groups on this rank, which would be orthogonalised as one
            matrix.
    """
    from megatron.core.optimizer.emerging_optimizers import _get_qkv_split_shapes

    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and parameter.dim() > 2:
                raise InputError(
                    f"{name} {list(parameter.shape)} with optimizer={config.optimizer}",
                    rule="Muon takes two-dimensional weights; Megatron hands this one to Adam "
                    "(core/optimizer/emerging_optimizers.py:128, 0.19.2)",
                    fix="keep one weight an expert: no --moe-single-grouped-weight",
                )
            if "linear_qkv.weight" in name and config.muon_split_qkv:
                # Rows of one group: its n / g query heads, then its key head and its value head.
                group = sum(_get_qkv_split_shapes(chunk.config))
                if parameter.shape[0] % group:
                    raise InputError(
                        f"{name} {list(parameter.shape)} with optimizer={config.optimizer}",
                        rule=f"a rank holds whole groups of {group} rows of queries, keys and "
                        "values; Megatron would orthogonalise these rows as one matrix "
                        "(core/optimizer/__init__.py:788, 0.19.2)",
                        fix="use no more tensor-parallel ranks than the model has key-value heads",
                    )
