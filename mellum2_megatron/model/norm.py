"""RMSNorm of the torch backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class TorchRMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` built the way Megatron's specs build norms.

    It normalises the last dimension: hidden states `[s, b, h]`, or the queries `[s, b, n, d]` and
    keys `[s, b, g, d]` of each head. Megatron's own wrapper for torch norms is not used: it refuses
    sequence parallelism (megatron/core/transformer/torch_norm.py:49, 0.19.2).

    Args:
        config: the model's configuration; must ask for RMSNorm.
        hidden_size: size of the normalised, last dimension: h or d.
        eps: added to the mean square.

    Raises:
        ValueError: the configuration asks for another norm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        if config.normalization != "RMSNorm":
            raise ValueError(
                f"normalization={config.normalization!r}: Mellum 2 has RMSNorm; "
                "use --normalization RMSNorm"
            )
        super().__init__(hidden_size, eps=eps)
        # With sequence parallelism a tensor-parallel rank normalises only its part of the sequence.
        # This tag makes Megatron sum the weight's gradient over those ranks
        # (megatron/core/distributed/finalize_model_grads.py:452, 0.19.2).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
