"""The torch backend against transformers: logits, gradients, and wrong readings of the report."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from mellum2_megatron.architecture import Mellum2Architecture, RopeParameters
from mellum2_megatron.model.provider import build_model
from mellum2_megatron.model.scoring import score_tokens
from tests.model.hf_reference import DEFAULT_ROPE, SMALL, Reference, make_reference, to_megatron

pytestmark = pytest.mark.usefixtures("megatron_world")

YARN = RopeParameters(
    rope_type="yarn",
    rope_theta=500_000.0,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=32,
    beta_slow=1,
)
S, F = "sliding_attention", "full_attention"
CASES: dict[str, tuple[Mellum2Architecture, int]] = {
    "window_shorter_than_the_sequence": (SMALL, 30),
    "window_equal_to_the_sequence": (SMALL.replace(sliding_window=30), 30),
    "window_one_below_the_sequence": (SMALL.replace(sliding_window=29), 30),
    "window_longer_than_the_sequence": (SMALL.replace(sliding_window=64), 30),
    "window_of_one": (SMALL.replace(sliding_window=1), 12),
    "yarn_past_its_original_length": (SMALL.replace(rope_full_attention=YARN), 50),
    "yarn_with_given_attention_factor_not_truncated": (
        SMALL.replace(
            rope_full_attention=RopeParameters(
                rope_type="yarn",
                rope_theta=10_000.0,
                factor=8.0,
                original_max_position_embeddings=12,
                beta_fast=4,
                beta_slow=1,
                attention_factor=1.5,
                truncate=False,
            )
        ),
        40,
    ),
    "another_theta_on_sliding_layers": (
        SMALL.replace(
            rope_sliding_attention=RopeParameters(rope_type="default", rope_theta=10_000.0)
        ),
        30,
    ),
    "seven_layers_of_period_three": (
        SMALL.replace(num_hidden_layers=7, layer_types=(S, S, F, S, S, F, S)),
        20,
    ),
    "no_period_full_first": (SMALL.replace(layer_types=(F, F, S, F)), 20),
    "full_attention_mtp": (SMALL.replace(mtp_layer_types=(F,), rope_full_attention=YARN), 40),
    "five_experts_top_three": (SMALL.replace(num_experts=5, num_experts_per_tok=3), 20),
    "seven_experts_top_one_of_softmax_over_all": (
        SMALL.replace(num_experts=7, num_experts_per_tok=1, norm_topk_prob=False),
        20,
    ),
    "seven_experts_top_one": (SMALL.replace(num_experts=7, num_experts_per_tok=1), 20),
    "not_renormalised": (SMALL.replace(norm_topk_prob=False), 20),
    "one_kv_head": (SMALL.replace(num_key_value_heads=1), 20),
    "four_kv_heads": (SMALL.replace(num_key_value_heads=4), 20),
    "no_mtp": (SMALL.replace(num_mtp_layers=0), 20),
    "two_mtp_layers": (
        SMALL.replace(num_mtp_layers=2, mtp_layer_types=("sliding_attention", F)),
        20,
    ),
    "dense_and_sparse": (
        SMALL.replace(mlp_layer_types=("dense", "sparse", "sparse", "dense")),
        20,
    ),
    "all_dense": (SMALL.replace(mlp_layer_types=("dense",) * 4), 20),
}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def twin(architecture: Mellum2Architecture, reference: Reference, **overrides):
    """Build the torch backend with the reference's weights; both have the same parameters."""
    model = build_model(architecture, backend="torch", parallel_output=True, **overrides)
    weights = to_megatron(
        architecture, {n: p.detach() for n, p in reference.named_parameters().items()}
    )
    assert set(weights) == {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def tokens_of(architecture: Mellum2Architecture, length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(
        0, architecture.vocab_size, (batch, length), generator=torch.Generator().manual_seed(7)
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    architecture, length = CASES[case]
    reference = make_reference(architecture)
    tokens = tokens_of(architecture, length)
    with torch.no_grad():
        logits, mtp_logits = reference.logits(tokens)
    ours, our_mtp = score_tokens(twin(architecture, reference), tokens)
    assert relative_error(ours, logits) < 1e-5
    if mtp_logits is None:
        assert our_mtp is None
    else:
        assert relative_error(our_mtp[:, :-1], mtp_logits) < 1e-5


@pytest.mark.parametrize(
    "case",
    [
        "window_shorter_than_the_sequence",
        "yarn_past_its_original_length",
        "five_experts_top_three",
        "one_kv_head",
        "four_kv_heads",
        "no_mtp",
        "two_mtp_layers",
        "dense_and_sparse",
        "all_dense",
        "not_renormalised",
        "seven_experts_top_one_of_softmax_over_all",
        "seven_experts_top_one",
    ],
)
def test_gradients_equal_transformers(case):
    architecture, length = CASES[case]
    reference = make_reference(architecture)
    tokens = tokens_of(architecture, length + 1)
    reference.loss(tokens, mtp_weight=0.1).backward()
    want = to_megatron(architecture, {n: p.grad for n, p in reference.named_parameters().items()})

    model = twin(architecture, reference, mtp_loss_scaling_factor=0.1)
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(length).expand_as(inputs)
    loss = model(
        inputs,
        positions,
        None,
        labels=labels,
        loss_mask=torch.ones_like(labels, dtype=torch.float32),
    )
    loss.mean().backward()
    # Experts without a token have no gradient. With one renormalised expert the routers have none
    # either, but for its rounding, which no two programs share.
    rounding = 1e-7 * max(gradient.abs().max().item() for gradient in want.values())
    errors = {
        name: relative_error(p.grad, want[name])
        for name, p in model.named_parameters()
        if max(p.grad.abs().max(), want[name].abs().max()) > rounding
    }
    routers = {name for name, _ in model.named_parameters() if name.endswith("router.weight")}
    assert routers & set(errors) == (set() if case == "seven_experts_top_one" else routers)
    assert max(errors.values()) < 1e-4, {
        name: error for name, error in errors.items() if error >= 1e-4
    }


WRONG_READINGS = {
    "window_one_too_wide": lambda a: a.replace(sliding_window=a.sliding_window + 1),
    "window_one_too_narrow": lambda a: a.replace(sliding_window=a.sliding_window - 1),
    "attention_factor_on_sliding_layers": lambda a: a.replace(
        # Factor 1 keeps the frequencies; the attention factor still scales the logits.
        rope_sliding_attention=RopeParameters(
            rope_type="yarn",
            rope_theta=500_000.0,
            factor=1.0,
            original_max_position_embeddings=16,
            attention_factor=YARN.resolved_attention_factor,
        )
    ),
    "no_attention_factor": lambda a: a.replace(
        rope_full_attention=RopeParameters(
            rope_type="yarn",
            rope_theta=500_000.0,
            factor=4.0,
            original_max_position_embeddings=16,
            attention_factor=1.0,
        )
    ),
    "yarn_on_no_layer": lambda a: a.replace(rope_full_attention=DEFAULT_ROPE),
    "yarn_on_every_layer": lambda a: a.replace(rope_sliding_attention=YARN),
    "router_not_renormalised": lambda a: a.replace(norm_topk_prob=False),
    "full_attention_layer_first_in_the_period": lambda a: a.replace(layer_types=(F, S, S, S)),
    "mtp_layer_with_full_attention": lambda a: a.replace(mtp_layer_types=(F,)),
}


@pytest.mark.parametrize("wrong", [*WRONG_READINGS, "mtp_fed_the_state_before_the_final_norm"])
def test_wrong_reading_would_be_caught(wrong):
    """A reference with one mistake differs by 100 times the tolerance of the comparison above."""
    architecture = SMALL.replace(rope_full_attention=YARN)
    misread = WRONG_READINGS.get(wrong, lambda a: a)(architecture)
    tokens = tokens_of(architecture, 50)
    right, reference = make_reference(architecture), make_reference(misread)
    with torch.no_grad():
        logits, mtp_logits = reference.logits(tokens, mtp_from_pre_norm=wrong.startswith("mtp_fed"))
    ours, our_mtp = score_tokens(twin(architecture, right), tokens)
    assert max(relative_error(ours, logits), relative_error(our_mtp[:, :-1], mtp_logits)) > 1e-3
