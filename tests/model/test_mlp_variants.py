"""A shared expert against a plain formula, in Megatron's layer and with its gradients."""

from __future__ import annotations

import pytest
import torch

from mellum2_megatron.architecture import to_hf_config
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Optimizer
from mellum2_megatron.model.muon_attributes import mark_parameters
from mellum2_megatron.model.provider import build_model
from tests.model.hf_reference import SMALL

pytestmark = pytest.mark.usefixtures("megatron_world")

WIDTH = 40
SHARED = SMALL.replace(shared_expert_intermediate_size=WIDTH)


def gated(hidden: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor) -> torch.Tensor:
    """Return the output of one MLP whose first matrix is [gate; up]."""
    gate, up = (hidden @ fc1.T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ fc2.T


def sparse_layer(hidden: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the output of a mixture with a shared expert for tokens `[t, h]`, one at a time."""
    scores = (hidden @ weights["router.weight"].T).softmax(-1)
    outputs = []
    for token, row in zip(hidden, scores, strict=True):
        top = row.topk(SMALL.num_experts_per_tok)
        output = gated(
            token,
            weights["shared_experts.linear_fc1.weight"],
            weights["shared_experts.linear_fc2.weight"],
        )
        for share, expert in zip(top.values / top.values.sum(), top.indices, strict=True):
            prefix = f"experts.local_experts.{expert}.linear_fc"
            output = output + share * gated(
                token, weights[f"{prefix}1.weight"], weights[f"{prefix}2.weight"]
            )
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("place", ["trunk", "mtp"])
def test_a_shared_expert_is_added_to_the_routed_ones(place: str):
    torch.manual_seed(2)
    model = build_model(SHARED, backend="torch")
    layer = model.decoder.layers[1] if place == "trunk" else model.mtp.layers[0].mtp_model_layer
    mlp = layer.mlp
    weights = {}
    for name, parameter in mlp.named_parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        weights[name] = parameter.detach().clone().requires_grad_()
    assert weights["shared_experts.linear_fc1.weight"].shape == (2 * WIDTH, SMALL.hidden_size)
    hidden = torch.randn(6, 2, SMALL.hidden_size)
    ours, _ = mlp(hidden)
    expected = sparse_layer(hidden.flatten(0, 1), weights)
    torch.testing.assert_close(ours.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    factor = torch.randn_like(expected)
    (expected * factor).sum().backward()
    (ours.flatten(0, 1) * factor).sum().backward()
    for name, parameter in mlp.named_parameters():
        theirs = weights[name].grad
        if theirs is None:  # an expert that no token chose
            assert not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-3, atol=1e-5)


def test_counts_of_a_shared_expert():
    """Three matrices in each sparse layer and MTP's, used by every token."""
    extra = 3 * WIDTH * SMALL.hidden_size
    assert SHARED.num_parameters() - SMALL.num_parameters() == 5 * extra
    assert SHARED.num_active_parameters() - SMALL.num_active_parameters() == 5 * extra
    assert SHARED.flops_per_token(64) - SMALL.flops_per_token(64) == pytest.approx(6 * 5 * extra)
    model = build_model(SHARED, backend="torch")
    assert sum(p.numel() for p in model.parameters()) == SHARED.num_parameters()
    mixed = SHARED.replace(mlp_layer_types=("dense", "sparse", "dense", "dense"))
    model = build_model(mixed, backend="torch")
    assert sum(p.numel() for p in model.parameters()) == mixed.num_parameters()


def test_muon_splits_every_gated_mlp():
    mixed = SHARED.replace(mlp_layer_types=("dense", "sparse", "dense", "sparse"))
    model = build_model(mixed, backend="torch")
    mark_parameters(model, Optimizer(muon_split_gate_up=True))
    split = {
        name: p.qkv_split_shapes
        for name, p in model.named_parameters()
        if getattr(p, "qkv_split_shapes", None)
    }
    assert split["decoder.layers.0.mlp.linear_fc1.weight"] == [SMALL.intermediate_size] * 2
    assert split["decoder.layers.1.mlp.shared_experts.linear_fc1.weight"] == [WIDTH] * 2
    firsts = {name for name, _ in model.named_parameters() if name.endswith("linear_fc1.weight")}
    assert split.keys() == firsts


def test_config_json_cannot_hold_a_shared_expert():
    with pytest.raises(InputError, match="MellumForCausalLM has no shared expert"):
        to_hf_config(SHARED)
    with pytest.raises(InputError, match="every layer is dense"):
        SHARED.replace(mlp_layer_types=("dense",) * 4)
