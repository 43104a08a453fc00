"""Rotary angles of one attention layer type, built from Megatron's own embeddings.

Mellum 2 rotates every layer with theta 500,000; the 128K model applies YaRN to its full-attention
layers alone (report §4). Megatron has one rotary embedding per model. Here each layer uses the
table of its own type instead.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

if TYPE_CHECKING:
    import torch

    from mellum2_megatron.architecture import RopeParameters


class RotaryTable:
    """The rotation angles of one `RopeParameters`, shared by all layers that use it.

    A plain object, not an `nn.Module`: assigned to an attention module it adds no state-dict key.

    The YaRN attention factor is *not* applied to the angles. All `d` dimensions rotate, hence
    scaling cos and sin of queries and keys by m equals scaling the attention logits by m². The
    latter keeps Transformer Engine's fused RoPE kernel, which has no such argument, and drops the
    factor in THD format (megatron/core/models/common/embeddings/rope_utils.py:318-327, 0.19.2).

    Args:
        parameters: rotary parameters of the layer type.
        head_dim: head dimension d.
    """

    def __init__(self, parameters: RopeParameters, head_dim: int) -> None:
        self.parameters = parameters
        self.head_dim = head_dim

    def __call__(
        self, length: int, *, packed: bool, cp_group: torch.distributed.ProcessGroup | None
    ) -> torch.Tensor:
        """Return the angles of `length` positions.

        Args:
            length: positions of the whole sequence, before context parallelism divides it.
            packed: true for a batch in THD format. The rotation then looks up each document's
                positions itself, and needs the complete table on every rank.
            cp_group: context-parallel group; unless `packed`, the rank's two zigzag chunks are
                returned.

        Returns:
            Angles in radians, `[s / cp, 1, 1, d]` (`[s, 1, 1, d]` if `packed`), float32.
        """
        table: Any = self._embedding(length, packed_seq=packed, cp_group=cp_group)
        # YaRN's embedding returns its own attention factor beside the angles.
        angles_s11d: torch.Tensor = table[0] if isinstance(table, tuple) else table
        return angles_s11d

    # Built at the first use, so that a model can be constructed on the meta device or before its
    # GPU is chosen.
    @functools.cached_property
    def _embedding(self) -> RotaryEmbedding:
        rope = self.parameters
        common = {
            "kv_channels": self.head_dim,
            "rotary_base": rope.rope_theta,
            "use_cpu_initialization": True,
        }
        if rope.rope_type == "default":
            return RotaryEmbedding(rotary_percent=1.0, **common)
        return YarnRotaryEmbedding(
            scaling_factor=rope.factor,
            original_max_position_embeddings=rope.original_max_position_embeddings,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            correction_range_round_to_int=rope.truncate,
            **common,
        )


@functools.cache
def rotary_table(parameters: RopeParameters, head_dim: int) -> RotaryTable:
    """Return the process-wide table of these parameters: 28 layers share two tables."""
    return RotaryTable(parameters, head_dim)
