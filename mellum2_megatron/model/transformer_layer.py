"""Megatron's transformer layer, whose router ignores the padding between packed documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.transformer.transformer_layer import TransformerLayer

from mellum2_megatron.model.context_parallel import document_padding

if TYPE_CHECKING:
    import torch


class Mellum2TransformerLayer(TransformerLayer):
    """`TransformerLayer` that leaves padding between documents out of router losses and counts.

    Megatron's `padding_mask` is wrong after the first stage (not split for sequence parallelism:
    megatron/core/models/gpt/gpt_model.py:352, 0.19.2) and shifted by one token for MTP
    (megatron/core/transformer/multi_token_prediction.py:1103). Each layer therefore derives it from
    `cu_seqlens`. Padding is still routed and computed, as in the rest of the model.
    """

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
        padded = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q_padded
        # Without padding both attributes are the same tensor. Inference computes no router loss.
        if self.training and padded is not None and padded is not packed_seq_params.cu_seqlens_q:
            padding_mask = document_padding(
                packed_seq_params,
                hidden_states.size(0),
                cp_group=self.pg_collection.cp,
                sp_group=self.tp_group if self.config.sequence_parallel else None,
            )
        return super()._forward_mlp(
            hidden_states, inference_context, padding_mask, packed_seq_params
        )
