"""Mellum 2's router: Megatron's, with load counts that stay exact and losses that know padding and
layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

if TYPE_CHECKING:
    from mellum2_megatron.config import Loss


class Mellum2Router(TopKRouter):
    """`TopKRouter` whose global load-balancing counts stay in float32 and can be read after the
    step.

    Its z-loss is the mean over real tokens where there is padding, and the gradient of the global
    load-balancing loss can be had without the factor that upstream loses (`exact_gradient`).

    `Float16Module` casts all floating buffers to BF16; upstream restores `expert_bias` only
    (megatron/core/transformer/moe/router.py:259-275, 0.19.2). In BF16 the token counts lose all but
    8 bits and the micro-batch counter sticks at 256. Overriding the same upstream hook keeps both
    in float32.
    """

    last_global_load: torch.Tensor | None = None
    """Tokens sent to each expert over the last whole batch, all ranks together: `[experts]`,
    float32."""

    exact_gradient = False
    """Whether the global load-balancing loss has the gradient of its value
    (`optimizer.Loss.aux_loss_gradient`)."""

    def _maintain_float32_expert_bias(self) -> None:
        super()._maintain_float32_expert_bias()
        for buffer in (self.global_tokens_per_expert, self.ga_steps):
            if buffer is not None and buffer.dtype != torch.float32:
                buffer.data = buffer.data.to(torch.float32)

    def reset_global_aux_loss_tracker(self) -> None:
        """Zero the running counts (Megatron calls this at the end of each batch), keeping a copy
        for the log."""
        if self.global_tokens_per_expert is not None:
            self.last_global_load = self.global_tokens_per_expert.detach().float().clone()
        super().reset_global_aux_loss_tracker()

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attach the loss to `activation`, so that it is differentiated with it, and log it.

        The global loss is a sum over the data-parallel ranks, of which each differentiates its own
        part: divided by the tokens of all ranks when it is computed, and by the ranks when DDP
        averages gradients (router.py:494-524, 0.19.2; Megatron-LM issue 3672). The value is right,
        the gradient that many times too small.
        """
        name = args[0] if args else kwargs["aux_loss_name"]
        if self.exact_gradient and name == "global_load_balancing_loss":
            ranks = self.tp_dp_cp_group.size() // self.tp_cp_group.size()
            aux_loss = aux_loss.detach() + ranks * (aux_loss - aux_loss.detach())
        result: torch.Tensor = super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, *args, **kwargs
        )
        return result

    def apply_z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attach the z-loss to the logits `[t, experts]` and log it; padding `[t]`, where it is
        true, does not count.

        With padding upstream takes the mean of the ranks' means, whatever number of tokens each has
        (router.py:621-645, 0.19.2); this is the mean over the tokens of all context- and
        sequence-parallel ranks.
        """
        coefficient = self.config.moe_z_loss_coeff
        if (
            padding_mask is None
            or coefficient is None
            or not (self.training and torch.is_grad_enabled())
        ):
            unpadded: torch.Tensor = super().apply_z_loss(logits, padding_mask)
            return unpadded
        tokens = (~padding_mask).sum()
        torch.distributed.all_reduce(tokens, group=self.tp_cp_group)
        total = torch.logsumexp(logits, dim=-1).square().masked_fill(padding_mask, 0.0).sum()
        mean = total / tokens.clamp(min=1)
        # Gradients that are to be averaged over tokens are divided by their number at the end of
        # the step.
        loss = coefficient * (total if self.calculate_per_token_loss else mean)
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(logits, loss)
        layers = self.config.num_layers
        get_moe_metrics_tracker().record(
            "z_loss",
            mean * self.tp_cp_group.size(),  # which is then averaged over the ranks
            self.layer_number + layers * self.is_mtp_layer,
            layers + (self.config.mtp_num_layers or 0),
            avg_group=self.tp_dp_cp_group,
        )
        return attached


def configure_routers(model: torch.nn.Module, loss: Loss) -> None:
    """Make the routers of a model compute ``loss`` as it says; what Megatron's arguments state is
    left to them."""
    for module in model.modules():
        if isinstance(module, Mellum2Router):
            module.exact_gradient = loss.aux_loss_gradient == "exact"
