"""Megatron's transformer layer, which tells its router what is padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.transformer.transformer_layer import TransformerLayer

from mellum2_megatron.model.context_parallel import document_padding

if TYPE_CHECKING:
    import torch


class Mellum2TransformerLayer(TransformerLayer):
    """`TransformerLayer` whose router leaves the padding between packed documents out of its losses
    and counts.

    Megatron hands a `padding_mask` down from the model's arguments, on the first pipeline stage
    only in the form that sequence parallelism needs, and shifts it by one token for MTP
    (gpt_model.py:352, multi_token_prediction.py:1103, 0.19.2). What is padding follows from the
    documents, which every layer is given; so each layer works it out. Padding is still routed and
    computed, like everywhere else in the model.
    """

    def _forward_mlp(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any = None,
        padding_mask: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Any:
        """Run the experts on `[s, b, h]`; documents decide on the mask where they have padding."""
        packed = packed_seq_params
        padded = None if packed is None else packed.cu_seqlens_q_padded
        if self.training and padded is not None and padded is not packed.cu_seqlens_q:
            padding_mask = document_padding(
                packed,
                hidden_states.size(0),
                cp_group=self.pg_collection.cp,
                sp_group=self.tp_group if self.config.sequence_parallel else None,
            )
        return super()._forward_mlp(
            hidden_states, inference_context, padding_mask, packed_seq_params
        )
