"""Latent attention against a plain formula in float64, with windows, YaRN and documents."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from mellum2_megatron.architecture import (
    PRESETS,
    LatentAttention,
    Mellum2Architecture,
    RopeParameters,
    architecture_arguments,
    to_hf_config,
)
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Optimizer, apply_overrides
from mellum2_megatron.model.muon_attributes import mark_parameters
from mellum2_megatron.model.provider import build_model
from mellum2_megatron.model.transformer_config import transformer_config
from mellum2_megatron.recipes import recipe
from tests.model.hf_reference import SMALL
from tests.model.packing import packed_documents

pytestmark = pytest.mark.usefixtures("megatron_world")

WIDTHS = LatentAttention(kv_lora_rank=10, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=14)
YARN = RopeParameters(
    rope_type="yarn",
    rope_theta=10_000.0,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=1.0,  # so that of four frequencies one stays, one is interpolated, two lie between
    beta_slow=0.01,
)
LATENT = SMALL.replace(latent_attention=WIDTHS, rope_full_attention=YARN)
MODELS = {
    "direct_queries": LATENT,
    "latent_queries": LATENT.replace(latent_attention=replace(WIDTHS, q_lora_rank=20)),
}
LENGTHS, ROOMS = (5, 17, 1, 9), (8, 20, 4, 12)
"""Longer and shorter than the window of 8, padded."""
TOLERANCE = 1e-5
"""Megatron computes angles in float32, everything else runs in float64 here."""


def frequencies(rope: RopeParameters, channels: int) -> torch.Tensor:
    """Return the rotation of a position, in radians, of each pair of channels."""
    exponents = torch.arange(0, channels, 2, dtype=torch.float64) / channels
    plain = rope.rope_theta**-exponents
    if rope.rope_type == "default":
        return plain

    def dimension(rotations: float) -> float:
        """Return the dimension whose channels turn so often over the original context."""
        context = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return channels * math.log(context) / (2 * math.log(rope.rope_theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), channels - 1)
    pairs = torch.arange(channels // 2, dtype=torch.float64)
    interpolated = ((pairs - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * interpolated + plain * (1 - interpolated)


def rotate(vectors: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Return `[s, b, n, r]` with each pair of neighbouring channels turned by `[s, r / 2]`."""
    pairs = torch.view_as_complex(vectors.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    return torch.view_as_real(turned).flatten(-2)


def norm(vectors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return RMSNorm."""
    return vectors * (vectors.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def formula(
    hidden: torch.Tensor,
    weights: dict[str, torch.Tensor],
    model: Mellum2Architecture,
    kind: str,
    places: torch.Tensor,
    visible: torch.Tensor,
) -> torch.Tensor:
    """Return latent attention of `[s, b, h]` written out.

    Args:
        weights: weights of the layer, by Megatron's names.
        kind: type of the layer.
        places: position of each token in its document, `[s]`.
        visible: queries and keys of one document without padding, `[s, s]`.
    """
    widths, heads = model.latent_attention, model.num_attention_heads
    nope, rope_type = widths.qk_nope_head_dim, model.rope(kind)
    if widths.q_lora_rank is None:
        queries = hidden @ weights["linear_q_proj.weight"].T
    else:
        latent = norm(
            hidden @ weights["linear_q_down_proj.weight"].T, weights["q_layernorm.weight"]
        )
        queries = latent @ weights["linear_q_up_proj.weight"].T
    queries = queries.unflatten(-1, (heads, -1))
    latent = hidden @ weights["linear_kv_down_proj.weight"].T
    shared = latent[..., None, widths.kv_lora_rank :]
    latent = norm(latent[..., : widths.kv_lora_rank], weights["kv_layernorm.weight"])
    up = (latent @ weights["linear_kv_up_proj.weight"].T).unflatten(-1, (heads, -1))
    angles = places[:, None] * frequencies(rope_type, widths.qk_rope_head_dim)
    logits = torch.einsum("ibnd,jbnd->bnij", queries[..., :nope], up[..., :nope])
    logits = logits + torch.einsum(
        "ibnd,jbnd->bnij",
        rotate(queries[..., nope:], angles),
        rotate(shared, angles).expand(-1, -1, heads, -1),
    )
    factor = 0.1 * math.log(rope_type.factor) + 1 if rope_type.rope_type == "yarn" else 1.0
    logits = logits * factor**2 / math.sqrt(widths.qk_head_dim)
    order = torch.arange(len(hidden))
    distance = order[:, None] - order[None, :]
    visible = visible & (distance >= 0)
    if kind == "sliding_attention":
        visible = visible & (distance < model.sliding_window)
    shares = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    output = torch.einsum("bnij,jbnd->ibnd", shares, up[..., nope:])
    return output.flatten(2) @ weights["linear_proj.weight"].T


@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "documents"])
@pytest.mark.parametrize("place", ["sliding", "full", "mtp"])
@pytest.mark.parametrize("name", MODELS)
def test_latent_attention_equals_the_formula(name: str, place: str, packed: bool):
    model = MODELS[name]
    torch.manual_seed(3)
    built = build_model(model, backend="torch").double().train()
    layer = {
        "sliding": built.decoder.layers[1],
        "full": built.decoder.layers[3],
        "mtp": built.mtp.layers[0].mtp_model_layer,
    }[place]
    attention = layer.self_attention
    weights = {}
    for key, parameter in attention.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=2 * scale)
        weights[key] = parameter.detach().clone().requires_grad_()
    length = sum(ROOMS) if packed else 44
    hidden = torch.randn(length, 1 if packed else 2, model.hidden_size, dtype=torch.float64)
    places, visible = torch.arange(length), torch.ones(length, length, dtype=torch.bool)
    documents = None
    if packed:
        documents = packed_documents(LENGTHS, ROOMS)
        starts = torch.tensor(list(itertools.accumulate(ROOMS, initial=0))[:-1])
        number = torch.repeat_interleave(torch.arange(len(ROOMS)), torch.tensor(ROOMS))
        places = places - starts[number]
        real = places < torch.tensor(LENGTHS)[number]
        visible = (number[:, None] == number[None, :]) & real[:, None] & real[None, :]
    expected = formula(
        hidden,
        weights,
        model,
        "full_attention" if place == "full" else "sliding_attention",
        places,
        visible,
    )
    output, bias = attention(hidden, None, packed_seq_params=documents)
    assert bias is None
    torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
    factor = torch.randn_like(expected)
    (output * factor).sum().backward()
    (expected * factor).sum().backward()
    assert weights.keys() == dict(attention.named_parameters()).keys()
    for key, parameter in attention.named_parameters():
        theirs = weights[key].grad
        assert theirs.abs().max() > 0.1, key
        torch.testing.assert_close(
            parameter.grad, theirs, rtol=TOLERANCE, atol=TOLERANCE * theirs.abs().max().item()
        )


def test_megatrons_fused_rotation_is_off():
    """It is on by default beside Transformer Engine, and refused without Megatron's own YaRN."""
    assert "--no-rope-fusion" in architecture_arguments(LATENT)
    assert "--no-rope-fusion" not in architecture_arguments(SMALL)
    with pytest.raises(ValueError, match="only works with YARN"):
        transformer_config(LATENT, apply_rope_fusion=True)


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_the_built_models(name: str):
    model = MODELS[name]
    built = build_model(model, backend="torch")
    assert sum(p.numel() for p in built.parameters()) == model.num_parameters()
    attention = built.decoder.layers[0].self_attention
    assert sum(p.numel() for p in attention.parameters()) == sum(
        p.numel for p in model.parameters() if p.name.startswith("model.layers.0.self_attn.")
    )


def test_flops_and_cache_are_those_of_its_matrices():
    """Six FLOPs a weight and token, six for each pair and channel of keys and of values."""
    length, heads, layers = 64, 4, 5
    expert = 3 * SMALL.moe_intermediate_size * SMALL.hidden_size
    attention = 48 * (4 * 20) + 48 * 18 + 10 * (4 * 26) + 48 * (4 * 14)
    active = layers * (attention + 4 * 48 + 2 * expert) + 2 * 48 * 48 + 2 * 97 * 48
    pairs = length * (length + 1) // 2 + 4 * (8 * 9 // 2 + (length - 8) * 8)
    assert LATENT.flops_per_token(length) == 6 * active + 6 * heads * (20 + 14) * pairs / length
    assert LATENT.cached_channels == 10 + 8
    assert SMALL.cached_channels == 2 * 2 * 16
    assert "num_attention_heads * latent_attention.(v_head_dim)" in LATENT.misaligned_dimensions()


@pytest.mark.parametrize("name", MODELS)
def test_muon_splits_keys_from_values(name: str):
    built = build_model(MODELS[name], backend="torch")
    mark_parameters(built, Optimizer())
    split = {
        key: parameter.qkv_split_shapes
        for key, parameter in built.named_parameters()
        if getattr(parameter, "is_qkv", False)
    }
    assert set(map(tuple, split.values())) == {(12, 14)}
    assert len(split) == 5
    assert all(key.endswith("self_attention.linear_kv_up_proj.weight") for key in split)


def test_config_json_cannot_hold_latent_attention():
    with pytest.raises(InputError, match="MellumForCausalLM has grouped queries only"):
        to_hf_config(LATENT)


def test_an_override_gives_all_widths():
    run = recipe("mellum2_tiny_pretrain")
    words = "kv_lora_rank:10,qk_nope_head_dim:12,qk_rope_head_dim:8,v_head_dim:14"
    for text in (f"{{{words}}}", f"{{{words.replace(':', ': ')}}}"):
        changed = apply_overrides(run, [f"architecture.latent_attention={text}"])
        assert changed.architecture.latent_attention == WIDTHS
        plain = changed.architecture.to_dict()
        assert Mellum2Architecture.from_dict(plain) == changed.architecture
        again = apply_overrides(changed, [f"architecture.latent_attention={text}"])
        assert again.architecture == changed.architecture
        back = apply_overrides(changed, ["architecture.latent_attention=null"])
        assert back.architecture == run.architecture
    for text, part in (
        ("{kv_lora_rank: 10}", "qk_nope_head_dim is missing"),
        ("{kv_lora_rnk: 10}", "did you mean 'architecture.latent_attention.kv_lora_rank'"),
        ("7", "must be a mapping"),
        ("{kv_lora_rank: 10", "not YAML"),
        (f"{{{words.replace('dim:8', 'dim:7')}}}", "must be even"),
    ):
        with pytest.raises(InputError, match=part):
            apply_overrides(run, [f"architecture.latent_attention={text}"])
    with pytest.raises(InputError, match="give the whole of it at once"):
        apply_overrides(run, ["architecture.latent_attention.kv_lora_rank=10"])


def test_tensor_parallelism_divides_heads_and_latents():
    """One key head is no bound; the latents are divided too, on the torch backend."""
    model = PRESETS["mellum2-tiny"].replace(num_key_value_heads=1, latent_attention=WIDTHS)
    layout = recipe("mellum2_tiny_pretrain").layout
    fits = replace(layout, ep=1, tp=2, sp=True)
    assert not fits.problems(model, world_size=2, sequence_length=512)
    odd = model.replace(latent_attention=replace(WIDTHS, kv_lora_rank=11))
    (problem,) = fits.problems(odd, world_size=2, sequence_length=512)
    assert "kv_lora_rank + qk_rope_head_dim (19)" in problem.rule
