"""The torch backend's own parts and the router, each against a plain formula."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.model.core_attention import (
    Span,
    TorchCoreAttention,
    causal_window_mask,
    split_into_blocks,
)
from mellum2_megatron.model.norm import TorchRMSNorm
from mellum2_megatron.model.provider import build_model
from mellum2_megatron.model.router import Mellum2Router
from mellum2_megatron.model.transformer_config import transformer_config
from tests.model.hf_reference import SMALL

pytestmark = pytest.mark.usefixtures("megatron_world")


@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 7), (1, 7)])
def test_mask_equals_its_definition(queries: int, keys: int, window: int | None):
    mask = causal_window_mask(queries, keys, window, torch.device("cpu"))
    for row in range(queries):
        position = row + keys - queries
        for key in range(keys):
            visible = 0 <= position - key < (window or keys)
            assert mask[row, key].item() == visible


def plain_attention(query, key, value, visible, scale):
    """Return softmax attention, one head at a time; `[s, b, n, d]` in, `[s, b, n * d]` out."""
    repeat = query.shape[2] // key.shape[2]
    out = torch.empty_like(query)
    for b in range(query.shape[1]):
        for head in range(query.shape[2]):
            q, k, v = query[:, b, head], key[:, b, head // repeat], value[:, b, head // repeat]
            scores = (q @ k.T * scale).masked_fill(~visible[b], float("-inf"))
            out[:, b, head] = torch.softmax(scores, dim=-1) @ v
    return out.flatten(2)


@pytest.mark.parametrize("window", [None, 4, 64, 70])
@pytest.mark.parametrize("documents", [False, True], ids=["one_document", "document_mask"])
@pytest.mark.parametrize(("queries", "s"), [(12, 12), (5, 12), (150, 150), (130, 150)])
def test_core_attention_is_plain_attention(
    window: int | None, documents: bool, queries: int, s: int
):
    """Both masks count: upstream's local attention forgets the given one on windowed layers."""
    torch.manual_seed(0)
    b, n, g, d = 2, 6, 2, 8
    config = transformer_config(SMALL)
    config.window_size = None if window is None else (window - 1, 0)
    attention = TorchCoreAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=0.3)
    query = torch.randn(queries, b, n, d, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(s, b, g, d, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    given = None
    visible = causal_window_mask(queries, s, window, torch.device("cpu")).expand(b, queries, s)
    if documents:  # a boundary after position 6 in the second sequence only
        document = torch.tensor([[0] * s, [0] * 7 + [1] * (s - 7)])
        same = document[:, -queries:, None] == document[:, None, :]
        given, visible = ~same[:, None], visible & same
    ours = attention(query, key, value, given)
    plain = plain_attention(query, key, value, visible, 0.3)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(plain)
    inputs = (query, key, value)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((plain * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("window", "sizes"),
    [
        (None, [2048, 952]),
        (4096, [2048, 952]),
        (1024, [1024, 1024, 952]),
        (4, [64] * 46 + [56]),
    ],
)
def test_blocks_are_hardly_longer_than_the_window(window: int | None, sizes: list[int]):
    whole = Span(query_start=5, size=3000, position_in_document=7, document_start=2)
    blocks = list(split_into_blocks(whole, window))
    assert [block.size for block in blocks] == sizes
    starts = [0, *itertools.accumulate(sizes)][:-1]
    assert [block.query_start - 5 for block in blocks] == starts
    assert [block.position_in_document - 7 for block in blocks] == starts
    assert {block.document_start for block in blocks} == {2}


def test_core_attention_refuses_unsupported_arguments():
    config = transformer_config(SMALL)
    with pytest.raises(NotImplementedError, match="only causal"):
        TorchCoreAttention(config, 1, AttnMaskType.padding, "self")
    attention = TorchCoreAttention(config, 1, AttnMaskType.causal, "self")
    tensor, boundaries = torch.zeros(4, 1, 2, 8), torch.tensor([0, 4])
    with pytest.raises(NotImplementedError, match="attention bias"):
        attention(tensor, tensor, tensor, None, attention_bias=torch.zeros(4, 4))
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    with pytest.raises(NotImplementedError, match="take no attention mask"):
        attention(
            tensor[:, 0],
            tensor[:, 0],
            tensor[:, 0],
            torch.zeros(1, 1, 4, 4).bool(),
            packed_seq_params=packed,
        )


def test_norm_equals_rmsnorm_and_is_tagged_for_sequence_parallelism():
    config = transformer_config(SMALL)
    config.sequence_parallel = True
    norm = TorchRMSNorm(config, 16, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 16))
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(
        norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    )
    assert norm.weight.sequence_parallel is True
    config.normalization = "LayerNorm"
    with pytest.raises(ValueError, match="--normalization RMSNorm"):
        TorchRMSNorm(config, 16)


def make_router(
    kind: Callable[..., TopKRouter], architecture: Mellum2Architecture = SMALL
) -> TopKRouter:
    config = transformer_config(
        architecture,
        moe_router_load_balancing_type="global_aux_loss",
        moe_aux_loss_coeff=1e-3,
        moe_z_loss_coeff=1e-3,
    )
    router = kind(config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    return router.train()


def test_one_renormalised_expert_learns_from_the_balancing_losses_alone():
    """Its probability is 1 whatever the logits; the losses attached to it still reach them."""
    architecture = SMALL.replace(num_experts_per_tok=1)
    router = make_router(functools.partial(Mellum2Router, norm_topk_prob=True), architecture)
    torch.manual_seed(1)
    probs, chosen = router(torch.randn(6, 2, SMALL.hidden_size))
    assert chosen.sum(-1).tolist() == [1] * 12
    torch.testing.assert_close(probs[chosen], torch.ones(12))
    # The weights of 12 tokens' losses differ, so that a probability below 1 would give a gradient.
    (probs.sum(-1) * torch.arange(12)).sum().backward()
    with_losses = router.weight.grad.clone()
    assert with_losses.abs().max() > 1e-6
    router.weight.grad = None
    router.eval()
    probs, _ = router(torch.randn(6, 2, SMALL.hidden_size))
    (probs.sum(-1) * torch.arange(12)).sum().backward()
    assert router.weight.grad.abs().max() < 1e-5  # rounding


def test_router_losses_equal_the_formulas():
    router = make_router(Mellum2Router)
    torch.manual_seed(1)
    hidden = torch.randn(6, 2, SMALL.hidden_size)
    get_moe_metrics_tracker().clear()
    probs, chosen = router(hidden)
    scores = torch.softmax((hidden.view(12, -1) @ router.weight.T).float(), dim=-1)
    top = scores.topk(SMALL.num_experts_per_tok).values
    picked = probs[chosen].view(12, -1).sort(descending=True).values
    torch.testing.assert_close(picked, (top / top.sum(-1, keepdim=True)).to(picked.dtype))
    share = chosen.float().sum(0) / (12 * SMALL.num_experts_per_tok)
    logits = hidden.view(12, -1) @ router.weight.T
    recorded = {
        name: entry.values[0].item() for name, entry in get_moe_metrics_tracker()._metrics.items()
    }
    balance = SMALL.num_experts * (share * scores.mean(0)).sum()
    assert recorded["global_load_balancing_loss"] == pytest.approx(balance.item(), rel=1e-5)
    assert recorded["z_loss"] == pytest.approx(
        logits.logsumexp(-1).square().mean().item(), rel=1e-5
    )
    get_moe_metrics_tracker().clear()


@pytest.mark.parametrize(
    ("kind", "exact"), [(Mellum2Router, True), (TopKRouter, False)], ids=["ours", "upstream"]
)
def test_load_counts_stay_exact_in_bf16(kind: type[TopKRouter], exact: bool):
    """BF16 counters stick at 256 of 300. "upstream" fails once Megatron counts in float32."""
    router = make_router(kind).bfloat16()
    hidden = torch.randn(7, 1, SMALL.hidden_size, dtype=torch.bfloat16)
    for _ in range(300):
        router(hidden)
    counted = router.global_tokens_per_expert.sum().item() == 300 * 7 * SMALL.num_experts_per_tok
    assert (router.ga_steps.item() == 300) is exact
    assert counted is exact
    if exact:
        before = router.global_tokens_per_expert.clone()
        router.reset_global_aux_loss_tracker()
        assert torch.equal(router.last_global_load, before)
        assert router.global_tokens_per_expert.sum() == 0
    get_moe_metrics_tracker().clear()


def test_every_matrix_is_initialised_alike():
    """Normal with `initializer_range`, output projections too (Megatron would shrink those)."""
    torch.manual_seed(0)
    model = build_model(SMALL.replace(initializer_range=0.03, num_experts=8), backend="torch")
    matrices = {
        name: p for name, p in model.named_parameters() if p.dim() == 2 and p.numel() >= 1000
    }
    assert {"linear_proj", "linear_fc2"} <= {name.split(".")[-2] for name in matrices}
    for name, parameter in matrices.items():
        spread = 0.03 * (1 + 4 / math.sqrt(2 * parameter.numel()))
        assert 0.03**2 / spread < parameter.std().item() < spread, name
    vectors = [p for p in model.parameters() if p.dim() == 1]
    assert len(vectors) > model.config.num_layers
    assert all(torch.equal(p, torch.ones_like(p)) for p in vectors)
