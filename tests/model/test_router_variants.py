"""Balancing of ablations: bias, capacity and counts, each against a plain count in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from mellum2_megatron.model.router import Mellum2Router
from mellum2_megatron.model.router_variants import VariantRouter, enable_router_bias, router_class
from mellum2_megatron.model.transformer_config import transformer_config
from tests.model.hf_reference import SMALL

pytestmark = pytest.mark.usefixtures("megatron_world")

RATE, EXPERTS, CHOSEN, TOKENS = 0.01, 8, 3, 40
MODEL = SMALL.replace(num_experts=EXPERTS, num_experts_per_tok=CHOSEN)


def make(*, bias: bool = False, norm: bool = True, **fields: object) -> VariantRouter:
    """Return a router in training with random weights and, if asked for, a random bias."""
    torch.manual_seed(3)
    model = MODEL.replace(norm_topk_prob=norm)
    config = transformer_config(model, **{"moe_router_load_balancing_type": "none"} | fields)
    if bias:
        enable_router_bias(config, RATE)
    assert router_class(config) is VariantRouter
    groups = ProcessGroupCollection.use_mpu_process_groups()
    router = VariantRouter(config, groups, norm_topk_prob=norm).train()
    router.set_layer_number(1)
    router.weight.data = torch.randn_like(router.weight)
    if bias:
        router.expert_bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    return router


def scores(router: VariantRouter, hidden: torch.Tensor) -> np.ndarray:
    """Return the softmax over all experts, `[t, e]`."""
    logits = (hidden.flatten(0, 1) @ router.weight.T).detach().double().numpy()
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


def test_the_released_balancing_keeps_the_released_router():
    config = transformer_config(MODEL, moe_router_load_balancing_type="global_aux_loss")
    assert router_class(config) is Mellum2Router


@pytest.mark.parametrize("norm", [True, False], ids=["renormalised", "plain"])
def test_the_bias_chooses_and_does_not_weigh(norm: bool):
    router = make(bias=True, norm=norm)
    hidden = torch.randn(TOKENS, 1, MODEL.hidden_size) / 4
    probabilities, chosen = router(hidden)
    plain = scores(router, hidden)
    bias = np.linspace(-0.2, 0.2, EXPERTS)
    picked = np.argsort(-(plain + bias), axis=1)[:, :CHOSEN]
    unbiased = np.argsort(-plain, axis=1)[:, :CHOSEN]
    assert any(set(one) != set(other) for one, other in zip(picked, unbiased, strict=True))
    expected = np.zeros_like(plain)
    for token, experts in enumerate(picked):
        expected[token, experts] = plain[token, experts]
        if norm:
            expected[token] /= expected[token].sum()
    assert np.array_equal(chosen.numpy(), expected > 0)
    np.testing.assert_allclose(probabilities.detach().numpy(), expected, rtol=1e-5)
    # The weights have the gradient of the scores, so the router learns from the loss.
    (probabilities.sum(-1) * torch.arange(TOKENS)).sum().backward()
    if not norm:
        assert router.weight.grad.abs().max() > 1e-3


def test_the_bias_moves_towards_an_even_load():
    """b_i += rate * sign(mean load - load_i), with the loads of all micro-batches of the step."""
    router = make(bias=True).bfloat16()
    before = np.linspace(-0.2, 0.2, EXPERTS).astype(np.float32)
    router._maintain_float32_expert_bias()
    router.expert_bias.copy_(torch.tensor(before))  # `bfloat16` has rounded it
    load = np.zeros(EXPERTS)
    for _ in range(40):  # BF16 counts would stick at 256
        hidden = torch.randn(TOKENS, 1, MODEL.hidden_size, dtype=torch.bfloat16) / 4
        load += router(hidden)[1].numpy().sum(0)
    router.eval()
    router(torch.randn(TOKENS, 1, MODEL.hidden_size, dtype=torch.bfloat16))  # not counted
    router.train()
    assert router.local_tokens_per_expert.dtype == torch.float32
    np.testing.assert_array_equal(router.local_tokens_per_expert.numpy(), load)
    assert load.max() > 256
    groups = ProcessGroupCollection.use_mpu_process_groups()
    _update_router_expert_bias([router], router.config, tp_dp_cp_group=groups.tp_dp_cp)
    expected = before + np.float32(RATE) * np.sign(load.mean() - load).astype(np.float32)
    np.testing.assert_array_equal(router.expert_bias.numpy(), expected)
    # Saved as it is: a cast to BF16 would lose the small steps.
    assert router.state_dict()["expert_bias"].dtype == torch.float32


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_padding_is_not_counted(bias: bool):
    router = make(bias=bias)
    padding = torch.arange(TOKENS)[:, None] >= TOKENS - 7
    _, chosen = router(torch.randn(TOKENS, 1, MODEL.hidden_size), padding)
    router.end_batch(publish=True)
    assert torch.equal(router.last_global_load, chosen[:-7].sum(0).float())
    assert router.last_dropped_share is None
    if bias:
        assert torch.equal(router.local_tokens_per_expert, router.last_global_load)


@pytest.mark.parametrize("factor", [0.7, 1.0, 8.0])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_a_full_expert_drops_its_lightest_tokens(factor: float, bias: bool):
    router = make(bias=bias, moe_expert_capacity_factor=factor)
    dropped = choices = 0
    load = np.zeros(EXPERTS)
    for _ in range(2):
        hidden = torch.randn(TOKENS, 1, MODEL.hidden_size)
        probabilities, kept = router(hidden)
        plain = scores(router, hidden)
        ranked = plain + np.linspace(-0.2, 0.2, EXPERTS) * bias
        wanted = np.zeros_like(plain)
        for token, experts in enumerate(np.argsort(-ranked, axis=1)[:, :CHOSEN]):
            wanted[token, experts] = plain[token, experts] / plain[token, experts].sum()
        room = math.ceil(TOKENS * CHOSEN / EXPERTS * factor)
        expected = wanted.copy()
        for expert in range(EXPERTS):
            expected[np.argsort(-wanted[:, expert])[room:], expert] = 0
        assert np.array_equal(kept.numpy(), expected > 0)
        np.testing.assert_allclose(probabilities.detach().numpy(), expected, rtol=1e-4)
        dropped += (wanted > 0).sum() - (expected > 0).sum()
        choices += TOKENS * CHOSEN
        load += (expected > 0).sum(0)
    router.end_batch(publish=True)
    assert (dropped > 0) == (factor < 2)
    assert router.last_dropped_share == pytest.approx(dropped / choices, abs=1e-6)
    np.testing.assert_array_equal(router.last_global_load.numpy(), load)
    # The next batch is counted from zero, and one that is not logged is forgotten.
    router(torch.randn(TOKENS, 1, MODEL.hidden_size))
    router.end_batch(publish=False)
    router(torch.randn(TOKENS, 1, MODEL.hidden_size))
    router.end_batch(publish=True)
    assert router.last_global_load.sum() <= TOKENS * CHOSEN


def test_the_bias_works_beside_a_sequence_loss():
    """Its scores and counts are those without the bias (arXiv 2412.19437, equations 17 to 20)."""
    get_moe_metrics_tracker().clear()
    fields = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.5}
    router = make(bias=True, **fields)
    hidden = torch.randn(TOKENS, 2, MODEL.hidden_size)
    router(hidden)
    losses = []
    for sequence in range(2):
        plain = scores(router, hidden[:, sequence : sequence + 1])
        chosen = np.argsort(-plain, axis=1)[:, :CHOSEN]
        share = np.bincount(chosen.ravel(), minlength=EXPERTS) / (TOKENS * CHOSEN)
        losses.append(EXPERTS * (share * plain.mean(0)).sum())
    recorded = get_moe_metrics_tracker()._metrics["seq_load_balancing_loss"].values[0].item()
    assert recorded == pytest.approx(np.mean(losses), rel=1e-5)
    get_moe_metrics_tracker().clear()
