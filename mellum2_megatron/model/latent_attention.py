"""Multi-head latent attention, a variant that no released model has (arXiv 2405.04434).

Window, rotation and scale of the logits differ by layer, as in `model.attention`:

- the window is the same: query ``i`` sees key ``j`` iff ``0 <= i - j < sliding_window``;
- a layer's frequencies, YaRN's included, are those of `qk_rope_head_dim` channels, the only ones
  that are rotated;
- YaRN's attention factor multiplies the whole logit by its square, not the rotated part alone. With
  grouped queries both are the same. DeepSeek-V2 and V3 do so too (``mscale_all_dim``).

Norms are those of the latents; heads have none of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_pg_size

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.model.attention import build_core_attention
from mellum2_megatron.model.rotary import RotaryTable, rotary_table
from mellum2_megatron.model.transformer_config import complete_config, require_matching_config

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.models.common.embeddings import RotaryEmbedding
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from mellum2_megatron.architecture import LayerType, Mellum2Architecture


class LatentSelfAttention(MLASelfAttention):
    """Megatron's latent attention with the window, rotation and scale of its own layer type.

    Hidden states are `[s, b, h]` (`[s / cp / sp, b, h]` under context and sequence parallelism).

    Args:
        config: the model's configuration; refused if it disagrees with `architecture`.
        submodules: projections, norms and core attention of the backend.
        layer_number: 1-based number within the decoder, or within the MTP block.
        architecture: the model's description.
        layer_types: attention type of every layer of the stack (decoder or MTP).

    Raises:
        ValueError: `config` describes another model than `architecture`.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
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
            # See `Mellum2SelfAttention`.
            raise ValueError(str(error)) from None
        latent = architecture.latent_attention
        assert latent is not None
        layer_type = layer_types[layer_number - 1]
        rope = architecture.rope(layer_type)
        softmax_scale = rope.resolved_attention_factor**2 / latent.qk_head_dim**0.5
        core_attention = ModuleSpec(
            module=LayerCoreAttention,
            params={
                "builder": submodules.core_attention,
                "window": architecture.sliding_window
                if layer_type == "sliding_attention"
                else None,
                "scale": softmax_scale,
            },
        )
        submodules = dataclasses.replace(submodules, core_attention=core_attention)
        super().__init__(config, submodules, layer_number, **kwargs)
        self.layer_type = layer_type
        self.softmax_scale = softmax_scale
        # A module's place takes a plain object only when the module is gone.
        shared = self._modules.pop("rotary_pos_emb")
        self.rotary_pos_emb = LayerRotation(
            rotary_table(rope, latent.qk_rope_head_dim), shared, self.pg_collection.cp
        )

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """Return the classes of projections and norms as the specs name them, for both backends.

        Megatron's own choice takes Transformer Engine's norms fused into the projections, so it has
        none on the torch backend without a latent of queries, and on the te backend it then norms
        the hidden state twice (megatron/core/transformer/mla_qk_norm_config.py:158-184, 0.19.2).
        """
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": submodules.q_layernorm,
            "kv_layernorm": submodules.kv_layernorm,
        }

    def _qkv_down_projection(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents of queries, and latents of keys and values beside the rotated key."""
        q_compressed, kv_combined = super()._qkv_down_projection(hidden_states)
        return q_compressed, self._sum_rotated_key_gradients(kv_combined)

    def _sum_rotated_key_gradients(self, kv_combined: torch.Tensor) -> torch.Tensor:
        """Return the same values, whose backward pass adds up all ranks' gradients.

        Each tensor-parallel rank has some of the heads, and all heads share the rotated key.
        Megatron adds up its gradients only where sequence parallelism divides the undivided
        projection. With a divided one a rank keeps the gradient of its own heads
        (megatron/core/transformer/multi_latent_attention.py:739-759, 0.19.2).

        Args:
            kv_combined: `[s, b, (kv_lora_rank + qk_rope_head_dim) / tp]`, or undivided
                `[s / sp, b, kv_lora_rank + qk_rope_head_dim]`.

        Returns:
            `[s / sp, b, kv_lora_rank + qk_rope_head_dim]`.
        """
        if get_pg_size(self.tp_group) == 1:
            return kv_combined
        latent, rotated = self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim
        divided = kv_combined.size(-1) != latent + rotated
        if divided:
            kv_combined = gather_from_tensor_model_parallel_region(kv_combined, self.tp_group)
        if self.config.sequence_parallel:
            # The caller gathers the rotated key again, and that sums in its backward pass.
            if divided:
                kv_combined = scatter_to_sequence_parallel_region(kv_combined, self.tp_group)
            return kv_combined
        latents, key = torch.split(kv_combined, [latent, rotated], dim=-1)
        return torch.cat(
            [latents, copy_to_tensor_model_parallel_region(key, self.tp_group)], dim=-1
        )


class LayerCoreAttention:
    """The backend's core attention with a layer's window and scale (`build_core_attention`).

    A class for `build_module`, which takes no function; its instances are the backend's.
    """

    def __new__(cls, *, builder: Any, **kwargs: Any) -> Any:
        """Build the core attention; arguments as for `build_core_attention`."""
        return build_core_attention(builder, **kwargs)


class LayerRotation:
    """Stands in for Megatron's rotary embedding of a layer, with the angles of the layer's type.

    Args:
        table: angles of the layer's type.
        shared: the embedding that it stands in for, which knows the length of a batch.
        cp_group: context-parallel group.
    """

    def __init__(
        self, table: RotaryTable, shared: RotaryEmbedding, cp_group: torch.distributed.ProcessGroup
    ) -> None:
        self.get_rotary_seq_len = shared.get_rotary_seq_len
        self._table, self._cp_group = table, cp_group

    def __call__(self, length: int, packed_seq: bool = False) -> torch.Tensor:
        """Return the angles of a batch, `[s / cp, 1, 1, qk_rope_head_dim]`; see `RotaryTable`."""
        return self._table(length, packed=packed_seq, cp_group=self._cp_group)


def put_latent_attention(
    submodules: TransformerLayerSubmodules,
    provider: BackendSpecProvider,
    architecture: Mellum2Architecture,
    layer_types: Sequence[LayerType],
) -> None:
    """Put latent attention into a layer's spec, in place of grouped queries.

    Args:
        submodules: spec of a layer, changed in place.
        provider: classes of the backend's modules.
        architecture: the model's description.
        layer_types: attention types of the layer's stack.
    """
    latent = architecture.latent_attention
    assert latent is not None
    # Transformer Engine has an undivided linear layer. Megatron has none of its own, so the torch
    # backend divides the projections to latents and gathers their outputs.
    down = provider.linear() if hasattr(provider, "linear") else provider.column_parallel_linear()
    up = provider.column_parallel_linear()
    norm = provider.layer_norm(rms_norm=True, for_qk=True)
    submodules.self_attention = ModuleSpec(
        module=LatentSelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "architecture": architecture,
            "layer_types": tuple(layer_types),
        },
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=up,
            linear_q_down_proj=down,
            linear_q_up_proj=up,
            linear_kv_down_proj=down,
            linear_kv_up_proj=up,
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=norm if latent.q_lora_rank is not None else IdentityOp,
            kv_layernorm=norm,
        ),
    )
    # No projection reads the hidden state alone, so neither backend fuses its norm.
    submodules.input_layernorm = provider.layer_norm(rms_norm=True, has_residual=True)
    submodules.sharded_state_dict_keys_map = {}
