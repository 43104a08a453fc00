"""Megatron's transformer layer, whose router ignores the padding between packed documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from mellum2_megatron.model.context_parallel import document_padding


@dataclass
class MaskedDocuments(PackedSeqParams):  # type: ignore[misc]  # megatron is untyped
    """Megatron's description of packed documents, and how much of them counts in the loss.

    Attributes:
        counted_share: tokens that count in the loss, divided by the tokens without padding, over
            the whole micro-batch; a scalar. Default None: all count.
    """

    counted_share: torch.Tensor | None = None


class Mellum2TransformerLayer(TransformerLayer):
    """`TransformerLayer` that leaves padding between documents out of router losses and counts.

    Megatron's `padding_mask` is wrong after the first stage (not split for sequence parallelism:
    megatron/core/models/gpt/gpt_model.py:352, 0.19.2) and shifted by one token for MTP
    (megatron/core/transformer/multi_token_prediction.py:1103). Each layer therefore derives it from
    `cu_seqlens`. Padding is still routed and computed, as in the rest of the model.
    """

    def _forward_attention(
        self, hidden_states: torch.Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        """Attend, and leave the documents of the micro-batch with the router.

        Megatron's plan of overlapped exchanges calls the router right after this, without a mask
        (megatron/core/models/gpt/fine_grained_callables.py:131, 0.19.2).

        Args:
            hidden_states: as for `_forward_mlp`.
            packed_seq_params: THD format of the batch, or None.
        """
        if isinstance(self.mlp, MoELayer):
            router = self.mlp.router
            router.document_padding = self._document_padding(packed_seq_params, hidden_states)
            if isinstance(packed_seq_params, MaskedDocuments):
                router.counted_share = packed_seq_params.counted_share
        return super()._forward_attention(
            hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
        )

    def _document_padding(
        self, packed_seq_params: Any, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the mask of padding between documents, `[b, s]`; None without any."""
        padded = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q_padded
        # Without padding both attributes are the same tensor. Inference computes no router loss.
        if not self.training or padded is None or padded is packed_seq_params.cu_seqlens_q:
            return None
        return document_padding(
            packed_seq_params,
            hidden_states.size(0),
            cp_group=self.pg_collection.cp,
            sp_group=self.tp_group if self.config.sequence_parallel else None,
        )

    def _forward_mlp(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any = None,
        padding_mask: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Any:
        """Run the experts, with the mask of the documents in place of the given one.

        Args:
            hidden_states: `[s, b, h]`, divided by context and sequence parallelism; b is 1 for
                packed documents.
            padding_mask: Megatron's mask `[b, s]`, true at padding; used without packed documents.
            packed_seq_params: THD format of the batch, or None.
        """
        if isinstance(self.mlp, MoELayer):
            # From here on the mask is an argument, which a recomputation gets again.
            own, self.mlp.router.document_padding = self.mlp.router.document_padding, None
            padding_mask = padding_mask if own is None else own
        return super()._forward_mlp(
            hidden_states, inference_context, padding_mask, packed_seq_params
        )
