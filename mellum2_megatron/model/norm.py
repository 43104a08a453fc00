"""RMSNorm of the torch backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class TorchRMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` built the way Megatron's specs build norms.

    Megatron's wrapper for torch norms refuses sequence parallelism
    (megatron/core/transformer/torch_norm.py:49, 0.19.2). All it takes is the tag by which Megatron
    sums the weight's gradient over tensor-parallel ranks, each of which normalises its own share of
    the sequence.

    Args:
        config: the model's configuration; must ask for RMSNorm.
        hidden_size: size of the normalised, last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        if config.normalization != "RMSNorm":
            raise ValueError(
                f"normalization={config.normalization!r}: Mellum 2 has RMSNorm; use --normalization RMSNorm"
            )
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
