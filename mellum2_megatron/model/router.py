"""Mellum 2's router: exact load counts, losses without padding, a true gradient on request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

if TYPE_CHECKING:
    from mellum2_megatron.config import Loss


class Mellum2Router(TopKRouter):
    """`TopKRouter` of hidden states `[s, b, h]` to k of e experts, with five differences.

    - The global load-balancing counts stay in float32 and can be read after the step.
    - With `exact_gradient` the balancing loss gets its true gradient; upstream divides by the
      data-parallel size once too often.
    - With padding the z-loss is the mean over all real tokens.
    - With a loss mask and a loss per token neither loss grows by the tokens that do not count.
    - With `norm_topk_prob` and one expert per token its probability becomes 1, as in transformers.

    Args:
        norm_topk_prob: the architecture's; default false, Megatron's own meaning of its fields.

    Attributes:
        last_global_load: tokens sent to each expert in the last complete batch, summed over all
            ranks: `[e]`, float32; None before the first batch ends.
        exact_gradient: give the global load-balancing loss its true gradient
            (`config.Loss.aux_loss_gradient`); default false.
        counted_share: share of the tokens without padding that count in the loss, a scalar; None
            (default): all of them. Set for each micro-batch.
        document_padding: mask of the padding between documents, `[b, s]`, where Megatron passes
            none; None (default): no padding. Set for each micro-batch.
    """

    last_global_load: torch.Tensor | None = None
    exact_gradient = False
    counted_share: torch.Tensor | None = None
    document_padding: torch.Tensor | None = None

    def __init__(self, *args: Any, norm_topk_prob: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With more experts Megatron's softmax over the chosen ones renormalises already.
        self._renormalises = norm_topk_prob and self.topk == 1

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route hidden states `[s, b, h]`; see `routing`."""
        if padding_mask is None and self.document_padding is not None:
            padding_mask = self.document_padding.transpose(0, 1)
        routed: tuple[torch.Tensor, torch.Tensor] = super().forward(input, padding_mask)
        return routed

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the probabilities and the map of the chosen experts, both `[t, e]`.

        Args:
            logits: router logits `[s, b, e]`.
            padding_mask: `[s, b]`, true at padding; None without padding.
        """
        probs, routing_map = super().routing(logits, padding_mask)
        if self._renormalises:
            # Divided, not set to 1: the attached losses reach the logits through `probs`.
            probs = probs / probs.sum(dim=-1, keepdim=True)
        return probs, routing_map

    def _maintain_float32_expert_bias(self) -> None:
        """Undo the cast of `Float16Module`, which turns all floating buffers to BF16.

        In BF16 the token counts lose all but 8 bits and the micro-batch counter sticks at 256.
        Upstream calls this in each forward pass and restores `expert_bias` only
        (megatron/core/transformer/moe/router.py:259-275, 0.19.2).
        """
        super()._maintain_float32_expert_bias()
        for buffer in (self.global_tokens_per_expert, self.ga_steps):
            if buffer is not None and buffer.dtype != torch.float32:
                buffer.data = buffer.data.to(torch.float32)

    def reset_global_aux_loss_tracker(self) -> None:
        """Zero the running counts, keeping a copy for the log.

        Megatron calls this when it finalises the gradients of a batch
        (megatron/core/distributed/finalize_model_grads.py:328, 0.19.2).
        """
        if self.global_tokens_per_expert is not None:
            self.last_global_load = self.global_tokens_per_expert.detach().float().clone()
        super().reset_global_aux_loss_tracker()

    def end_batch(self, *, publish: bool) -> None:
        """Do nothing at the end of a batch: `reset_global_aux_loss_tracker` keeps the counts.

        Args:
            publish: set `last_global_load` for the log.
        """

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attach the loss to `activation`, so that the backward pass includes it, and log it.

        Args:
            activation: routing probabilities `[t, e]`.
            aux_loss_coeff: coefficient of the loss, already multiplied into `aux_loss`.
            aux_loss: the balancing loss, a scalar.
        """
        name = args[0] if args else kwargs["aux_loss_name"]
        factor = self._masked_factor()
        if self.exact_gradient and name == "global_load_balancing_loss":
            # Each data-parallel rank differentiates its own part of a sum over the ranks. Upstream
            # divides the part by the tokens of all ranks, and DDP's mean of gradients divides by
            # the number of ranks once more (router.py:494-524, 0.19.2; Megatron-LM issue 3672).
            # The value is right, so only its gradient is multiplied.
            factor = factor * (self.tp_dp_cp_group.size() // self.tp_cp_group.size())
        if isinstance(factor, torch.Tensor) or factor != 1:
            aux_loss = aux_loss.detach() + factor * (aux_loss - aux_loss.detach())
        result: torch.Tensor = super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, *args, **kwargs
        )
        return result

    def _masked_factor(self) -> torch.Tensor | float:
        """Return the factor of a router loss's gradient that a loss mask asks for.

        With a loss per token upstream multiplies a router loss by the micro-batch's tokens without
        padding (router.py:604-634, 0.19.2), and Megatron divides all gradients by the tokens of
        the step that count. Where a third counts, the loss would weigh three times as much. It is
        therefore multiplied by the tokens that count.
        """
        if self.calculate_per_token_loss and self.counted_share is not None:
            return self.counted_share
        return 1.0

    def apply_z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attach the z-loss to the logits and log it.

        With padding upstream takes the mean of the ranks' means, however many tokens each of them
        has (router.py:621-645, 0.19.2). Here it is the mean over the real tokens of all context-
        and sequence-parallel ranks.

        Args:
            logits: router logits `[t, e]`.
            padding_mask: `[t]`, true at padding (upstream's docstring says the reverse, its code
                does not); None without padding.

        Returns:
            The logits `[t, e]`.
        """
        coefficient = self.config.moe_z_loss_coeff
        masked = self.calculate_per_token_loss and self.counted_share is not None
        if (
            (padding_mask is None and not masked)
            or coefficient is None
            or not (self.training and torch.is_grad_enabled())
        ):
            unpadded: torch.Tensor = super().apply_z_loss(logits, padding_mask)
            return unpadded
        if padding_mask is None:
            padding_mask = torch.zeros_like(logits[:, 0], dtype=torch.bool)
        tokens = (~padding_mask).sum()
        torch.distributed.all_reduce(tokens, group=self.tp_cp_group)
        squares_t = torch.logsumexp(logits, dim=-1).square()
        total = squares_t.masked_fill(padding_mask, 0.0).sum()
        mean = total / tokens.clamp(min=1)
        # With a loss per token Megatron divides all gradients by the tokens of the step at its
        # end, so nothing is divided here.
        per_token = self.calculate_per_token_loss
        loss = coefficient * (total * self._masked_factor() if per_token else mean)
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(logits, loss)
        layers = self.config.num_layers
        get_moe_metrics_tracker().record(
            "z_loss",
            # Each rank's `mean` is only its part of the total. The tracker averages over ranks, so
            # the factor turns that average into the sum of the parts.
            mean * self.tp_cp_group.size(),
            self.layer_number + layers * self.is_mtp_layer,  # MTP layers follow the decoder's
            layers + (self.config.mtp_num_layers or 0),
            avg_group=self.tp_dp_cp_group,
        )
        return attached


def configure_routers(model: torch.nn.Module, loss: Loss) -> None:
    """Set on a model's routers the loss settings that have no Megatron argument.

    Args:
        model: a `GPTModel`, or one pipeline stage of it.
        loss: loss settings; ``aux_loss_gradient`` takes effect here.
    """
    for module in model.modules():
        if isinstance(module, Mellum2Router):
            module.exact_gradient = loss.aux_loss_gradient == "exact"
