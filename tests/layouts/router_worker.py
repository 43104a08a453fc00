"""One rank of the router tests: a router, a share of the tokens, one backward pass."""

from __future__ import annotations

import torch

EXPERTS, CHOSEN, HIDDEN, TOKENS = 8, 2, 16, 12
AUX, Z = 0.7, 0.3


def tokens(rank: int) -> torch.Tensor:
    """Return the hidden states of a rank, `[t, 1, h]`."""
    return torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(5 + rank))


def padding(rank: int) -> torch.Tensor:
    """Return a rank's mask, `[t, 1]`, true at padding: another number on each rank."""
    return torch.arange(TOKENS)[:, None] >= TOKENS - 2 - 5 * rank


def weight() -> torch.Tensor:
    """Return the router's weight, `[e, h]`."""
    return torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(4))


def losses(kind: str, cp: int, exact: bool, padded: bool) -> tuple[torch.Tensor, float, float]:
    """Return the gradient of both losses as DDP averages it, and the losses as they are logged."""
    from megatron.core import parallel_state as mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from mellum2_megatron import upstream
    from mellum2_megatron.model.router import Mellum2Router

    upstream.activate()
    mpu.initialize_model_parallel(context_parallel_size=cp)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=EXPERTS,
        moe_router_topk=CHOSEN,
        moe_router_load_balancing_type=kind,
        moe_aux_loss_coeff=AUX,
        moe_z_loss_coeff=Z,
        moe_router_dtype="fp32",
        add_bias_linear=False,
        context_parallel_size=cp,
    )
    router = Mellum2Router(config, ProcessGroupCollection.use_mpu_process_groups()).train()
    router.set_layer_number(1)
    router.exact_gradient = exact
    router.weight.data = weight()
    rank = torch.distributed.get_rank()
    # As Megatron's pipeline schedule does for one micro-batch.
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(float(cp)))
    probabilities, _ = router(tokens(rank), padding(rank) if padded else None)
    (probabilities.sum() * 0).backward()
    assert router.weight.grad is not None
    torch.distributed.all_reduce(router.weight.grad)
    tracker = get_moe_metrics_tracker()
    name = kind.replace("aux_loss", "load_balancing_loss")
    tracker._sync_metrics([name, "z_loss"])
    logged = [float(tracker.metrics[loss].values.sum()) for loss in (name, "z_loss")]
    return router.weight.grad / torch.distributed.get_world_size(), logged[0], logged[1]
