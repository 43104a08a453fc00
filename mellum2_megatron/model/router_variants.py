"""A router for ablations: balancing other than the released model's global loss.

Megatron has both mechanisms, and each lacks a part that these ablations need:

- the auxiliary-loss-free bias (arXiv 2408.15664) exists for sigmoid scores only
  (megatron/core/transformer/transformer_config.py:2284, 0.19.2). Mellum 2's scores are a softmax,
  and another score function would be a second difference between two arms;
- tokens beyond an expert's capacity are dropped without being counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mellum2_megatron.model.router import Mellum2Router

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def router_class(config: TransformerConfig) -> type[Mellum2Router]:
    """Return the router of a configuration: the released model's unless it balances otherwise."""
    released = (
        config.moe_router_load_balancing_type == "global_aux_loss"
        and not config.moe_router_enable_expert_bias
        and config.moe_expert_capacity_factor is None
    )
    return Mellum2Router if released else VariantRouter


def enable_router_bias(config: TransformerConfig, update_rate: float) -> None:
    """Give the routers of a model, before it is built, a bias that balances them.

    Megatron refuses the field beside softmax scores when a configuration is made, because its own
    choice of experts would ignore the bias. `VariantRouter` does not, so it is set afterwards.
    Megatron then updates the bias when it finalises the gradients of a step
    (megatron/core/distributed/finalize_model_grads.py:334 and 665, 0.19.2).

    Args:
        config: Megatron's configuration, already checked.
        update_rate: change of the bias in a step (`config.Loss.bias_update_rate`).
    """
    config.moe_router_enable_expert_bias = True
    config.moe_router_bias_update_rate = update_rate


class VariantRouter(Mellum2Router):
    """`Mellum2Router` with a bias on softmax scores, and with counts of what experts compute.

    With the bias a token's experts are the k largest of ``softmax(logits) + bias``. Their weights
    come from the logits alone, as without the bias, so the bias itself gets no gradient.

    Attributes:
        last_dropped_share: share of the chosen experts of all tokens that had no room in the last
            complete batch, 0 to 1; None before the first batch ends, or without a capacity.
    """

    last_dropped_share: float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.enable_expert_bias:
            # Megatron's hook for choosing experts in another way than by the largest scores.
            self.router_replay = _BiasedChoice(self)
        # Tokens that each expert computes, then the number of real tokens: `[e + 1]`. No buffer,
        # because `Float16Module` turns buffers to BF16.
        self._counts: torch.Tensor | None = None

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the counts that move the bias in float32 too; in BF16 they lose all but 8 bits."""
        super()._maintain_float32_expert_bias()
        counts = self.local_tokens_per_expert
        if counts is not None and counts.dtype != torch.float32:
            counts.data = counts.data.to(torch.float32)

    def _apply_expert_bias(
        self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> None:
        """Count the tokens of each expert; Megatron calls this at the end of each routing.

        Upstream combines a map `[t, e]` with a mask `[t]`, which fails with padding
        (megatron/core/transformer/moe/router.py:682, 0.19.2).

        Args:
            routing_map: experts that compute a token, `[t, e]`.
            padding_mask: `[t]`, true at padding; None without padding.
        """
        if not (self.training and torch.is_grad_enabled()):
            return
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
            tokens = (~padding_mask).sum()
        else:
            tokens = torch.tensor(len(routing_map), device=routing_map.device)
        computed = routing_map.sum(dim=0)
        if self.enable_expert_bias:
            self.local_tokens_per_expert += computed
        counts = torch.cat((computed, tokens[None])).float()
        self._counts = counts if self._counts is None else self._counts + counts

    def end_batch(self, *, publish: bool) -> None:
        """Start the next batch's counts, having published this one's for the log.

        A collective of the ranks that share the layer's experts.
        """
        counts, self._counts = self._counts, None
        if not publish or counts is None:
            return
        torch.distributed.all_reduce(counts, group=self.tp_dp_cp_group)
        self.last_global_load = counts[:-1]
        if self.config.moe_expert_capacity_factor is not None:
            chosen = self.topk * counts[-1]
            self.last_dropped_share = float(1 - counts[:-1].sum() / chosen.clamp(min=1))


class _BiasedChoice:
    """Choice of experts by biased scores, in the form of Megatron's `RouterReplay`.

    Args:
        router: router whose `expert_bias` `[e]` is added.
    """

    def __init__(self, router: VariantRouter) -> None:
        self._router = router
        self.layer_number = router.layer_number  # set by Megatron

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default: Callable[..., Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and indices of the chosen experts, both `[t, k]`.

        Args:
            scores: logits `[t, e]`; with `moe_router_pre_softmax` their softmax.
            topk: number k of experts of a token.
            num_groups, group_topk, default: Megatron's, unused: Mellum 2 has no groups of experts.
        """
        pre_softmax = self._router.config.moe_router_pre_softmax
        probabilities = scores if pre_softmax else torch.softmax(scores, dim=-1)
        biased = probabilities.detach() + self._router.expert_bias
        indices = biased.topk(topk, dim=1).indices
        return scores.gather(1, indices), indices
