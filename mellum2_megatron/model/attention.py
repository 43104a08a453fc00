"""Layer-selective self-attention: each layer has its own window, rotation and logit scale.

====================== ================================ ===================================
layer type             window                           rotation and scale of the logits
====================== ================================ ===================================
`sliding_attention`    `sliding_window` keys (1,024)    plain RoPE, `1 / sqrt(d)`
`full_attention`       all keys                         YaRN in the 128K model, which also
                                                        multiplies the scale (report §4)
====================== ================================ ===================================

Megatron has one rotary embedding per model, and picks windowed layers by arithmetic on the layer
number. The MTP layer (always number 1) and models with another pattern do not follow that rule.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.model.rotary import rotary_table
from mellum2_megatron.model.transformer_config import complete_config, require_matching_config

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mellum2_megatron.architecture import LayerType, Mellum2Architecture


class Mellum2SelfAttention(SelfAttention):
    """Megatron's self-attention with the window, rotation and softmax scale of its own layer type.

    Args:
        config: the model's configuration; refused if it disagrees with `architecture`.
        submodules: projections, norms and core attention of the backend.
        layer_number: 1-based number within the decoder, or within the MTP block. It is global under
            pipeline parallelism (megatron/core/transformer/transformer_layer.py:343-348, 0.19.2).
        architecture: the model's description.
        layer_types: attention type of every layer of the stack (decoder or MTP), layers of other
            pipeline stages included.

    Raises:
        ValueError: `config` describes another model than `architecture`; all differing arguments
            are named.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *,
        architecture: Mellum2Architecture,
        layer_types: Sequence[LayerType],
        **kwargs: Any,
    ) -> None:
        complete_config(config, architecture)
        try:
            require_matching_config(config, architecture)
        except InputError as error:
            # Megatron re-raises a constructor's error as `type(error)(one string)`, which
            # InputError does not take (megatron/core/transformer/spec_utils.py:118-127, 0.19.2).
            raise ValueError(str(error)) from None
        layer_type = layer_types[layer_number - 1]
        rope = architecture.rope(layer_type)
        window = architecture.sliding_window if layer_type == "sliding_attention" else None
        # YaRN scales queries and keys by the attention factor, so their products by its square.
        softmax_scale = rope.resolved_attention_factor**2 / architecture.head_dim**0.5
        core_attention = functools.partial(
            build_core_attention, submodules.core_attention, window=window, scale=softmax_scale
        )
        submodules = dataclasses.replace(submodules, core_attention=core_attention)
        super().__init__(config, submodules, layer_number, **kwargs)
        self.layer_type = layer_type
        # Megatron's dynamic-batching inference bypasses the core attention and reads this
        # (megatron/core/transformer/attention.py:1085, 0.19.2).
        self.softmax_scale = softmax_scale
        self._rotary_table = rotary_table(rope, architecture.head_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        key_value_states: torch.Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, with the model's shared angles replaced by those of this layer's type.

        Args:
            hidden_states: `[s, b, h]` (`[s / cp / sp, b, h]` under context and sequence
                parallelism).
            attention_mask: `[b or 1, 1, s, s]`, true where attention is forbidden, or None.
            rotary_pos_emb: the model's shared angles `[s, 1, 1, d]`; only their length is used.

        Returns:
            Output `[s, b, h]` and the projection's bias (None).

        Raises:
            ValueError: the model passes no angles: it was built without `--position-embedding-type
                rope`, or runs an inference kernel that takes precomputed cos and sin and would
                bypass the layer's own.
        """
        if rotary_pos_emb is None:
            raise ValueError(
                "Mellum 2 rotates every layer, but the model passed no rotary angles: build it "
                "with --position-embedding-type rope, and without flash_decode or FlashInfer's "
                "fused RoPE"
            )
        shared = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        cp_group = self.pg_collection.cp
        # Megatron passes all angles for packed documents, else only those of the rank's share.
        length = shared.size(0) if packed or cp_group is None else shared.size(0) * cp_group.size()
        own_angles = self._rotary_table(length, packed=packed, cp_group=cp_group)
        output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
            hidden_states,
            attention_mask,
            key_value_states,
            inference_context,
            own_angles,
            *args,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )
        return output


def build_core_attention(
    builder: Callable[..., torch.nn.Module],
    *,
    window: int | None,
    scale: float,
    config: TransformerConfig,
    softmax_scale: float | None,
    **kwargs: Any,
) -> torch.nn.Module:
    """Build the backend's core attention for one layer's window and scale.

    Args:
        builder: the backend's core-attention class.
        window: keys that a query may see, its own included (Hugging Face's `sliding_window`), or
            None for all.
        scale: factor on the attention logits, YaRN's squared attention factor included.
        config: the model's configuration.
        softmax_scale: the configuration's own scale; always None, because
            `require_matching_config` accepts no other.
        **kwargs: further arguments of `builder`, from Megatron.
    """
    # A copy for the core attention alone: Megatron changes the shared configuration during
    # training, and all other modules must keep seeing those changes.
    layer_config = copy.copy(config)
    # Megatron and Transformer Engine count the keys *before* the query.
    layer_config.window_size = None if window is None else (window - 1, 0)
    layer_config.window_attn_skip_freq = None
    return builder(config=layer_config, softmax_scale=scale, **kwargs)
