"""The router's losses and their gradients, against the formulas written out in float64."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import run_distributed
from tests.layouts.router_worker import AUX, CHOSEN, EXPERTS, Z, padding, tokens, weight

pytestmark = pytest.mark.distributed


def formula(ranks: int, padded: bool, acts_like: float) -> tuple[torch.Tensor, float, float]:
    """Evaluate both losses over all ranks' real tokens.

    They are e * sum_i f_i P_i (arXiv 2501.11873) and the mean of logsumexp^2 (arXiv 2202.08906).

    Returns:
        Gradient `[e, h]` of `acts_like` times the first plus `Z` times the second; the two values.
    """
    hidden = torch.cat([tokens(rank) for rank in range(ranks)])[:, 0].double()
    if padded:
        hidden = hidden[~torch.cat([padding(rank) for rank in range(ranks)])[:, 0]]
    matrix = weight().double().requires_grad_()
    logits = hidden @ matrix.T
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(CHOSEN).indices, 1.0)
    share, probability = chosen.sum(0) / (len(hidden) * CHOSEN), logits.softmax(-1).mean(0)
    balance = EXPERTS * (share * probability).sum()
    size = logits.logsumexp(-1).square().mean()
    (acts_like * balance + Z * size).backward()
    assert matrix.grad is not None
    return matrix.grad, balance.item(), size.item()


@pytest.mark.parametrize(
    ("kind", "ranks", "cp", "exact", "padded", "acts_like"),
    [
        ("global_aux_loss", 1, 1, False, False, AUX),
        ("global_aux_loss", 2, 1, True, False, AUX),
        ("global_aux_loss", 2, 2, False, True, AUX),
        ("aux_loss", 2, 2, False, False, AUX),
        ("aux_loss", 2, 2, False, True, AUX),
        # Upstream's gradient. When this fails, upstream no longer loses the factor: drop
        # `exact_gradient`.
        ("global_aux_loss", 2, 1, False, False, AUX / 2),
    ],
)
def test_losses_equal_the_formulas(
    kind: str, ranks: int, cp: int, exact: bool, padded: bool, acts_like: float
):
    gradient, balance, size = formula(ranks, padded, acts_like)
    for actual_gradient, *logged in run_distributed(
        "tests.layouts.router_worker:losses", ranks, kind, cp, exact, padded
    ):
        torch.testing.assert_close(actual_gradient.double(), gradient, rtol=1e-5, atol=1e-6)
        assert logged == pytest.approx([balance, size], rel=1e-5)
