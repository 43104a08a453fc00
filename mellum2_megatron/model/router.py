"""Mellum 2's router: Megatron's, with load counts that stay exact."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter


class Mellum2Router(TopKRouter):
    """`TopKRouter` whose global load-balancing counts stay in float32 and can be read after the step.

    `Float16Module` casts all floating buffers to BF16; upstream restores `expert_bias` only
    (megatron/core/transformer/moe/router.py:259-275, 0.19.2). In BF16 the token counts lose all but 8 bits and the
    micro-batch counter sticks at 256. Overriding the same upstream hook keeps both in float32.
    """

    last_global_load: torch.Tensor | None = None
    """Tokens sent to each expert over the last whole batch, all ranks together: `[experts]`, float32."""

    def _maintain_float32_expert_bias(self) -> None:
        super()._maintain_float32_expert_bias()
        for buffer in (self.global_tokens_per_expert, self.ga_steps):
            if buffer is not None and buffer.dtype != torch.float32:
                buffer.data = buffer.data.to(torch.float32)

    def reset_global_aux_loss_tracker(self) -> None:
        """Zero the running counts (Megatron calls this at the end of each batch), keeping a copy for the log."""
        if self.global_tokens_per_expert is not None:
            self.last_global_load = self.global_tokens_per_expert.detach().float().clone()
        super().reset_global_aux_loss_tracker()
