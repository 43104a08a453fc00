"""Parameters and FLOPs: the report's figures, transformers' own Mellum, and an enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.architecture import PRESETS, Mellum2Architecture, to_hf_config
from tests.architecture.variants import FULL, ODD, RELEASED, SLIDING, TINY, VARIANTS


@pytest.mark.parametrize("preset", ["mellum2-12b", "mellum2-12b-128k"])
def test_parameter_counts_of_the_released_model(preset: str) -> None:
    arch = Mellum2Architecture.preset(preset)
    assert arch.num_parameters(mtp=False) == 12_149_923_072
    assert arch.num_parameters(mtp=True) == 12_578_294_528
    assert arch.num_active_parameters(mtp=False) == 2_439_060_736
    assert arch.num_active_parameters(mtp=True) == 2_520_615_680
    assert len(list(arch.parameters(mtp=False))) == 5_631


def test_layer_and_embedding_counts_of_the_released_model() -> None:
    layer = [p for p in RELEASED.parameters() if p.layer == 5 and not p.mtp]
    active = [p for p in RELEASED.active_parameters() if p.layer == 5 and not p.mtp]
    assert sum(p.numel for p in layer) == 417_747_712
    assert sum(p.numel for p in active) == 70_931_200
    assert [p.numel for p in RELEASED.parameters() if p.component == "embedding"] == [226_492_416]
    assert [p.numel for p in RELEASED.parameters() if p.component == "output head"] == [226_492_416]


def test_flops_of_the_released_model() -> None:
    assert round(RELEASED.flops_per_token(8192, mtp=True) / 1e9, 3) == 17.570
    assert round(RELEASED.flops_per_token(8192, mtp=False) / 1e9, 3) == 15.675
    assert round(RELEASED.flops_per_token(131072, mtp=True) / 1e9, 3) == 38.775


def test_presets_follow_the_alignment_rule() -> None:
    assert all(not arch.misaligned_dimensions() for arch in PRESETS.values())
    assert ODD.misaligned_dimensions() == {
        "vocab_size": 331,
        "hidden_size": 60,
        "moe_intermediate_size": 17,
        "num_attention_heads * head_dim": 42,
        "num_key_value_heads * head_dim": 14,
    }


def _hf_models(arch: Mellum2Architecture) -> tuple[Any, Any]:
    """Build transformers' trunk and MTP head of ``arch`` on the meta device."""
    torch = pytest.importorskip("torch")
    from transformers import MellumConfig, MellumForCausalLM
    from transformers.modeling_layers import MtpModel

    with torch.device("meta"):
        model = MellumForCausalLM(MellumConfig(**to_hf_config(arch)))
        mtp = MtpModel(model, 1) if arch.num_mtp_layers else None
    return model, mtp


def _mtp_weights(mtp: Any) -> dict[str, tuple[int, ...]]:
    shared = ("embed_tokens.", "shared_head.")
    return {
        name: tuple(p.shape) for name, p in mtp.named_parameters() if not name.startswith(shared)
    }


@pytest.mark.parametrize("name", [*VARIANTS, "mellum2-12b"])
def test_counts_equal_transformers(name: str) -> None:
    arch = VARIANTS.get(name) or PRESETS[name]
    model, mtp = _hf_models(arch)
    trunk = sum(p.numel() for p in model.parameters())
    head = sum(math.prod(shape) for shape in _mtp_weights(mtp).values()) if mtp is not None else 0
    assert arch.num_parameters(mtp=False) == trunk
    assert arch.num_parameters(mtp=True) == trunk + head


@pytest.mark.parametrize("name", VARIANTS)
def test_trunk_names_and_shapes_equal_what_transformers_saves(name: str) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    arch = VARIANTS[name].replace(num_mtp_layers=0)
    model, _ = _hf_models(arch)
    saved = revert_weight_conversion(model, model.state_dict())
    assert {p.name: p.shape for p in arch.parameters()} == {
        key: tuple(value.shape) for key, value in saved.items()
    }


@pytest.mark.parametrize("arch", [TINY, ODD], ids=["tiny", "odd"])
def test_transformers_loads_every_listed_tensor_and_misses_none(
    arch: Mellum2Architecture, tmp_path: Path
) -> None:
    """transformers cannot save MTP names, but its loader is strict: our list alone must load."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(arch, "float32")))
    weights = {p.name: torch.full(p.shape, float(i)) for i, p in enumerate(arch.parameters())}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    mtp = MtpModel.from_pretrained(model)
    loaded = {name: p.flatten() for name, p in mtp.named_parameters()}
    for key, name in {
        "mtp.fc.weight": "layers.0.eh_proj.weight",
        "mtp.norm.weight": "layers.0.post_norm.weight",
        "mtp.pre_fc_norm_embedding.weight": "layers.0.enorm.weight",
        "mtp.pre_fc_norm_hidden.weight": "layers.0.hnorm.weight",
        "mtp.layers.0.self_attn.o_proj.weight": "layers.0.mtp_block.self_attn.o_proj.weight",
    }.items():
        assert loaded[name].eq(weights[key].flatten()).all(), key
    expected = sum(weights[p.name].double().sum() for p in arch.parameters() if p.mtp)
    assert sum(loaded[name].double().sum() for name in _mtp_weights(mtp)) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_rope_attention_factor_equals_transformers(name: str) -> None:
    arch = VARIANTS[name].replace(num_mtp_layers=0)
    model, _ = _hf_models(arch)
    for kind in set(arch.layer_types):
        scaling = getattr(model.model.rotary_emb, f"{kind}_attention_scaling")
        assert arch.rope(kind).resolved_attention_factor == scaling


def test_attention_factor_of_the_long_context_preset() -> None:
    arch = PRESETS["mellum2-12b-128k"]
    assert arch.rope(SLIDING).resolved_attention_factor == 1.0
    assert arch.rope(FULL).resolved_attention_factor == 0.1 * math.log(16) + 1
    unset = dataclasses.replace(arch.rope_full_attention, attention_factor=None)
    assert unset.resolved_attention_factor == 0.1 * math.log(16) + 1


def _flops_by_enumeration(arch: Mellum2Architecture, length: int, mtp: bool) -> int:
    """Return FLOPs of one sequence: 2 per multiply-add of each (query, key) pair, in 3 passes."""
    h, d, e = arch.hidden_size, arch.head_dim, arch.moe_intermediate_size
    heads, kv = arch.num_attention_heads, arch.num_key_value_heads

    def layer(kind: str) -> int:
        macs = 0
        for i in range(length):
            macs += h * heads * d + 2 * h * kv * d + heads * d * h  # q, k, v, o
            macs += h * arch.num_experts + arch.num_experts_per_tok * 3 * h * e
            for j in range(length):
                if j <= i and (kind == FULL or i - j < (arch.sliding_window or 0)):
                    macs += heads * (d + d)  # one dot product, one weighted value
        return macs

    macs = sum(layer(kind) for kind in arch.layer_types) + length * h * arch.vocab_size
    if mtp:
        macs += sum(
            layer(kind) + length * 2 * h * h + length * h * arch.vocab_size
            for kind in arch.mtp_layer_types
        )
    return macs * 2 * 3


@pytest.mark.parametrize(("length", "mtp"), itertools.product([1, 10, 11, 12, 37], [True, False]))
def test_flops_equal_an_enumeration_of_pairs(length: int, mtp: bool) -> None:
    flops = ODD.flops_by_component(length, mtp=mtp)
    assert sum(flops.values()) == _flops_by_enumeration(ODD, length, mtp)
    assert ODD.flops_per_token(length, mtp=mtp) == sum(flops.values()) / length


def test_mtp_flag_has_no_effect_without_an_mtp_layer() -> None:
    arch = TINY.replace(num_mtp_layers=0)
    assert arch.num_parameters(mtp=True) == arch.num_parameters(mtp=False)
    assert arch.flops_per_token(64, mtp=True) == arch.flops_per_token(64, mtp=False)
