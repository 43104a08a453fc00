"""Both heads in chunks equal Megatron's cross entropy of all logits at once, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mellum2_megatron.config import Loss
from mellum2_megatron.upstream import patching
from mellum2_megatron.upstream.patches import PATCHES
from tests.layouts.worker import ARCHITECTURE

pytestmark = pytest.mark.usefixtures("megatron_world")

ULP = 2**-7
"""Relative distance of neighbouring BF16 numbers, at most."""


@pytest.fixture(scope="module", autouse=True)
def _patched() -> None:
    patching.install(PATCHES)


def outcome(chunk: int | None, dtype: torch.dtype, *, masked: bool = True) -> dict[str, Any]:
    """Return losses, MTP counts and gradients of one step of a small model."""
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from mellum2_megatron.model.provider import model_provider
    from mellum2_megatron.model.transformer_config import transformer_config

    config = transformer_config(
        ARCHITECTURE, use_cpu_initialization=True, bf16=dtype == torch.bfloat16, params_dtype=dtype
    )
    torch.manual_seed(3)
    model = model_provider(ARCHITECTURE, "torch", loss=Loss(head_chunk=chunk))(config=config)
    called = Float16Module(config, model) if config.bf16 else model
    rows = torch.randint(0, ARCHITECTURE.vocab_size, (2, 18))
    mask = torch.ones(2, 17)
    if masked:
        mask[0, 4:9] = 0.0
    MTPLossLoggingHelper.tracker.clear()
    loss = called(
        rows[:, :-1],
        torch.arange(17).expand(2, -1),
        None,
        labels=rows[:, 1:].contiguous(),
        loss_mask=mask,
    )
    ((loss * mask).sum() / 7).backward()
    tracker = MTPLossLoggingHelper.tracker
    counts = {name: tracker[f"{name}_values"].clone() for name in ("loss", "correct", "total")}
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return {"loss": loss.detach(), **counts, **gradients}


@pytest.mark.parametrize("chunk", [1, 5, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_losses_counts_and_gradients_are_those_of_all_logits(chunk: int, dtype: torch.dtype):
    whole, chunked = outcome(None, dtype), outcome(chunk, dtype)
    assert torch.equal(chunked["total"], whole["total"])
    assert torch.equal(chunked["correct"], whole["correct"])
    # In BF16 one rounding at the heads travels through the whole model.
    tolerance = 1e-6 if dtype == torch.float32 else 8 * ULP
    for name, value in whole.items():
        scale = value.abs().max()
        assert scale > 0 or name in ("correct", "total"), name
        difference = (chunked[name] - value).abs().max()
        assert difference <= tolerance * scale, f"{name}: {difference / scale:.1e}"


def head(chunk: int | None, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, list[torch.Tensor]]:
    """Return a function of hidden states, weight, labels: one head's losses; and its inputs."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    from mellum2_megatron.model.chunked_head import ChunkedHead

    torch.manual_seed(1)
    hidden = torch.randn(64, 2, 32, dtype=dtype, requires_grad=True)
    weight = (torch.randn(1024, 32) / 4).to(dtype).requires_grad_()
    labels = torch.randint(0, 1024, (2, 64))
    group = get_tensor_model_parallel_group()

    def losses() -> torch.Tensor:
        if chunk is None:
            logits = hidden @ weight.t()
            return vocab_parallel_cross_entropy(logits, labels.t().contiguous(), tp_group=group).t()
        layer = torch.nn.Module()
        layer.weight, layer.sequence_parallel = torch.nn.Parameter(weight.detach()), False
        chunks = ChunkedHead(layer, chunk, group)  # type: ignore[arg-type]
        chunks(hidden, weight=weight)
        return chunks.loss(labels, hidden, None)

    return losses, [hidden, weight]


def test_one_chunk_repeats_the_bits_where_the_factor_is_a_power_of_two():
    results = []
    for chunk in (None, 128):
        losses, inputs = head(chunk)
        value = losses()
        results.append([value, *torch.autograd.grad(value.sum() / 4, inputs)])
    for whole, chunked in zip(*results, strict=True):
        assert torch.equal(whole, chunked)


def test_a_factor_is_not_rounded_to_bf16():
    """Losses times 1.003, which BF16 would turn into 1.0."""
    losses, inputs = head(32)
    plain = torch.autograd.grad(losses().sum(), inputs)
    scaled = torch.autograd.grad(losses().sum() * 1.003, inputs)
    for one, other in zip(plain, scaled, strict=True):
        ratio = (other.double().norm() / one.double().norm()).item()
        assert abs(ratio - 1.003) < 3e-4


def test_gradients_out_of_proportion_to_the_mask_are_refused():
    losses, inputs = head(32)
    value = losses()
    with pytest.raises(RuntimeError, match="not proportional to the loss mask"):
        torch.autograd.grad((value * value.detach()).sum(), inputs)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 128], ids=["one", "all"])
def test_a_gradient_that_is_not_finite_reaches_both(factor: float, tokens: int):
    """So that the step guard finds and skips the step, on whichever rank."""
    losses, inputs = head(32)
    factors = torch.ones(2, 64)
    factors.view(-1)[:tokens] = factor
    for gradient in torch.autograd.grad((losses() * factors).sum(), inputs):
        assert not gradient.isfinite().all()


def peak(chunk: int | None) -> int:
    """Return the largest number of bytes that one head's step holds at a time."""
    losses, inputs = head(chunk)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        torch.autograd.grad(losses().sum(), inputs)
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # in the order of time
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_chunks_take_less_memory():
    """A chunk of 8 has a sixteenth of all logits, `[128, 1024]`, and of their softmax."""
    logits = 128 * 1024
    assert peak(None) > 6 * logits, "logits in BF16 and their softmax in float32"
    # The weight's gradient: accumulated in float32, once more as a product, and in BF16.
    assert peak(8) < logits * 10 // 16 + 1024 * 32 * 8 + 64 * 1024
