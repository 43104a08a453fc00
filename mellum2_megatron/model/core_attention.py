"""Core attention of the torch backend: grouped-query attention with a window, on any device.

Megatron's own `DotProductAttention` overwrites a given mask on windowed layers
(megatron/core/fusions/fused_softmax.py:319-327, 0.19.2) and repeats keys and values in memory; this one combines both
masks and leaves the kernel to `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.transformer_config import TransformerConfig


class TorchCoreAttention(MegatronModule):
    """Causal softmax attention over queries `[sq, b, n, d]` and grouped keys and values `[sk, b, g, d]`.

    Args:
        config: the layer's configuration: `window_size` is `(keys before the query, 0)` or None.
        layer_number: 1-based layer number, unused.
        attn_mask_type: must be causal.
        attention_type: must be "self".
        attention_dropout: dropout on the attention weights; the configuration's if None.
        softmax_scale: factor on the logits; `1 / sqrt(d)` if None.

    Raises:
        NotImplementedError: context parallelism, or a mask type other than causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise NotImplementedError(
                f"context_parallel_size={config.context_parallel_size}: the torch backend attends within one rank; "
                "use context_parallel_size=1 or the te backend"
            )
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise NotImplementedError(f"{attention_type} attention with {attn_mask_type}: only causal self-attention")
        window_size = config.window_size
        self.window = None if window_size is None else window_size[0] + 1
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: `[sq, b, n, d]`; query i stands at position `i + sk - sq`.
            key, value: `[sk, b, g, d]`, g divides n.
            attention_mask: `[b or 1, 1, sq, sk]`, true where attention is forbidden, *in addition* to causality and
                the window.

        Returns:
            `[sq, b, n * d]`.

        Raises:
            NotImplementedError: packed documents (THD) or an attention bias.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError("the torch backend takes neither packed documents (THD) nor an attention bias")
        sq, sk = query.size(0), key.size(0)
        windowed = self.window is not None and self.window < sk
        visible: torch.Tensor | None = None
        if windowed or attention_mask is not None or sq != sk:
            visible = causal_window_mask(sq, sk, self.window if windowed else None, query.device)
            if attention_mask is not None:
                visible = visible & ~attention_mask
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=visible is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return context.permute(2, 0, 1, 3).reshape(sq, query.size(1), -1)


@functools.lru_cache(maxsize=16)
def causal_window_mask(sq: int, sk: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which keys each query sees: `[sq, sk]`, true iff `0 <= position(query) - position(key) < window`.

    The queries are the last `sq` of `sk` positions. `window` counts the query itself (report §2), None means no limit.
    """
    distance = torch.arange(sk - sq, sk, device=device)[:, None] - torch.arange(sk, device=device)[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    return visible
