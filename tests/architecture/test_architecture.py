"""The description against the report's figures, and against transformers' own Mellum on the meta
device."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.architecture import PRESETS, Mellum2Architecture, from_hf_config, to_hf_config
from mellum2_megatron.architecture.mellum2 import RopeParameters
from mellum2_megatron.common.errors import InputError
from tests import REPOSITORY

TINY = PRESETS["mellum2-tiny"]
RELEASED = PRESETS["mellum2-12b"]
SLIDING, FULL = "sliding_attention", "full_attention"

RELEASED_CONFIG: dict[str, Any] = {  # config.json of the released 128K checkpoints
    "architectures": ["MellumForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 28,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 7168,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 7,
    "max_position_embeddings": 131072,
    "mlp_layer_types": ["sparse"] * 28,
    "model_type": "mellum",
    "moe_intermediate_size": 896,
    "mtp_layer_types": [SLIDING],
    "mtp_mlp_layer_types": ["sparse"],
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        FULL: {
            "attention_factor": 1.2772588722239782,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000,
            "rope_type": "yarn",
        },
        SLIDING: {"rope_theta": 500000, "rope_type": "default"},
    },
    "router_aux_loss_coef": 0.001,
    "sliding_window": 1024,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 98304,
}
BASE_PRETRAIN_CONFIG = RELEASED_CONFIG | {
    "max_position_embeddings": 8192,
    "rope_parameters": {
        kind: {"rope_theta": 500000, "rope_type": "default"} for kind in (FULL, SLIDING)
    },
}

ODD = TINY.replace(  # nothing a multiple of anything else
    vocab_size=331,
    hidden_size=60,
    intermediate_size=7,
    num_hidden_layers=5,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=14,
    moe_intermediate_size=17,
    num_experts=5,
    num_experts_per_tok=3,
    sliding_window=11,
    eos_token_id=(1, 5),
    pad_token_id=2,
)
VARIANTS = {
    "tiny": TINY,
    "odd sizes, one KV head": ODD,
    "no MTP": TINY.replace(num_mtp_layers=0, num_hidden_layers=2),
    "full MTP layer": TINY.replace(mtp_layer_types=(FULL,)),
    "all full": TINY.replace(layer_types=(FULL,) * 4, mtp_layer_types=(FULL,), sliding_window=None),
    "two periods, yarn": TINY.replace(
        num_hidden_layers=8,
        norm_topk_prob=False,
        rope_full_attention=RopeParameters(
            rope_type="yarn",
            rope_theta=7e4,
            factor=4.0,
            original_max_position_embeddings=128,
            beta_fast=24.0,
            mscale=1.5,
            mscale_all_dim=0.7,
        ),
    ),
}


# -- the report's figures
# -------------------------------------------------------------------------------------------


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


# -- against transformers
# -------------------------------------------------------------------------------------------


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
    """The MTP names have no saver in transformers, but its loader is strict: a folder of exactly
    our list must load."""
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


# -- FLOPs by brute force
# -------------------------------------------------------------------------------------------


def _flops_by_enumeration(arch: Mellum2Architecture, length: int, mtp: bool) -> int:
    """Multiply-adds of one sequence, written out per layer and per (query, key) pair, times 2 FLOPs
    and 3 passes."""
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


def test_mtp_flag_is_nothing_without_an_mtp_layer() -> None:
    arch = TINY.replace(num_mtp_layers=0)
    assert arch.num_parameters(mtp=True) == arch.num_parameters(mtp=False)
    assert arch.flops_per_token(64, mtp=True) == arch.flops_per_token(64, mtp=False)


# -- config.json
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "preset"),
    [(BASE_PRETRAIN_CONFIG, "mellum2-12b"), (RELEASED_CONFIG, "mellum2-12b-128k")],
)
def test_released_configs_are_the_presets_both_ways(config: dict[str, Any], preset: str) -> None:
    assert from_hf_config(config) == PRESETS[preset]
    assert to_hf_config(PRESETS[preset]) == config


@pytest.mark.parametrize("name", VARIANTS)
def test_config_round_trip_through_transformers(name: str) -> None:
    """What transformers writes of our config, aliases and all, reads back as the same
    architecture."""
    from transformers import MellumConfig

    arch = VARIANTS[name]
    written = json.loads(MellumConfig(**to_hf_config(arch)).to_json_string(use_diff=False))
    assert from_hf_config(written) == arch
    assert from_hf_config(json.loads(json.dumps(to_hf_config(arch)))) == arch


def test_absent_keys_mean_what_they_mean_in_transformers() -> None:
    from transformers import MellumConfig

    bare = from_hf_config({"model_type": "mellum"})
    defaults = json.loads(MellumConfig().to_json_string(use_diff=False))
    assert bare == from_hf_config(defaults)
    assert set(bare.layer_types) == {FULL}
    assert bare.rope_sliding_attention.rope_theta == 10_000.0
    assert bare.num_mtp_layers == 0


def test_mtp_types_of_a_folder_without_its_head_are_ignored() -> None:
    arch = from_hf_config(BASE_PRETRAIN_CONFIG | {"num_nextn_predict_layers": 0})
    assert arch == RELEASED.replace(num_mtp_layers=0)


def test_attribute_aliases_are_read() -> None:
    config = dict(BASE_PRETRAIN_CONFIG)
    config["num_local_experts"] = config.pop("num_experts")
    config["num_mtp_layers"] = config.pop("num_nextn_predict_layers")
    assert from_hf_config(config) == RELEASED


def test_truncate_is_read_where_transformers_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MellumConfig
    from transformers.models.mellum.modeling_mellum import MellumRotaryEmbedding

    def frequencies(rope_parameters: dict[str, Any]) -> list[float]:
        embedding = MellumRotaryEmbedding(
            MellumConfig(**RELEASED_CONFIG | {"rope_parameters": rope_parameters})
        )
        return embedding.full_attention_inv_freq.tolist()

    entry = RELEASED_CONFIG["rope_parameters"][FULL]
    inside = RELEASED_CONFIG["rope_parameters"] | {FULL: entry | {"truncate": False}}
    beside = RELEASED_CONFIG["rope_parameters"] | {"truncate": False}
    plain = frequencies(RELEASED_CONFIG["rope_parameters"])
    assert frequencies(inside) == plain
    assert frequencies(beside) != plain
    with caplog.at_level(logging.WARNING):
        arch = from_hf_config(RELEASED_CONFIG | {"rope_parameters": inside})
    assert arch.rope_full_attention.truncate
    assert "truncate" in caplog.text
    arch = from_hf_config(RELEASED_CONFIG | {"rope_parameters": beside})
    assert not arch.rope_full_attention.truncate
    assert to_hf_config(arch)["rope_parameters"]["truncate"] is False
    assert from_hf_config(to_hf_config(arch)) == arch


def test_keys_nobody_reads_are_named_and_known_ones_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    extra = {
        "transformers_version": "5.23.0",
        "use_cache": False,
        "auto_map": {},
        "torch_dtype": "float32",
    }
    with caplog.at_level(logging.WARNING):
        from_hf_config(BASE_PRETRAIN_CONFIG | extra)
        assert not caplog.records
        from_hf_config(BASE_PRETRAIN_CONFIG | {"flux_capacitor": 1.21, "eos_token_id": 98304})
    assert "flux_capacitor" in caplog.text
    assert "eos_token_id=98304" in caplog.text


def _rope(kind: str, **changes: Any) -> dict[str, Any]:
    ropes = RELEASED_CONFIG["rope_parameters"]
    entry = {key: value for key, value in (ropes[kind] | changes).items() if value != "absent"}
    return {"rope_parameters": ropes | {kind: entry}}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe'"),
        ({"model_type": None, "architectures": None}, "model_type=None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_layer_types": ["sparse"] * 27 + ["dense"]}, "mlp_layer_types[27]='dense'"),
        ({"mtp_mlp_layer_types": ["dense"]}, "mtp_mlp_layer_types[0]='dense'"),
        ({"mlp_layer_types": ["sparse"] * 27}, "mlp_layer_types with 27 entries"),
        (
            {"num_nextn_predict_layers": 2, "mtp_layer_types": None, "mtp_mlp_layer_types": None},
            "num_mtp_layers=2",
        ),
        ({"num_nextn_predict_layers": True}, "num_mtp_layers=True"),
        ({"mtp_layer_types": []}, "mtp_layer_types with 0 entries"),
        ({"layer_types": [SLIDING] * 27}, "layer_types with 27 entries"),
        ({"layer_types": [SLIDING] * 27 + ["chunked_attention"]}, "'chunked_attention'"),
        ({"layer_types": SLIDING}, f"layer_types='{SLIDING}'"),
        ({"sliding_window": None}, "sliding_window=None"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"num_local_experts": 32}, "num_local_experts=32 beside num_experts=64"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok=65"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"head_dim": 127}, "head_dim=127"),
        ({"hidden_size": "2304"}, "hidden_size='2304'"),
        ({"num_hidden_layers": "28"}, "num_hidden_layers='28'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling="),
        (
            {"rope_parameters": None, "rope_theta": 1e6},
            "rope_theta=1000000.0 without rope_parameters",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters="),
        (
            {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e4}}},
            f"without '{SLIDING}'",
        ),
        (_rope(FULL, rope_type="llama3"), "rope_type='llama3'"),
        (_rope(FULL, partial_rotary_factor=0.25), "partial_rotary_factor=0.25"),
        (_rope(FULL, original_max_position_embeddings="absent"), "of type yarn"),
        (_rope(FULL, factor="absent"), "of type yarn"),
        (_rope(FULL, factor=-1), "rope.factor=-1"),
        (_rope(SLIDING, rope_theta="absent"), "without rope_theta"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ({"per_layer_config": [{}]}, "per_layer_config="),
        ({"chain_hidden_post_norm": False}, "chain_hidden_post_norm=False"),
        ({"mtp_hidden_states_first": True}, "mtp_hidden_states_first=True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_mellum2_cannot_express_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        from_hf_config(RELEASED_CONFIG | changes)


# -- our own fields
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_architecture_json_round_trip(name: str) -> None:
    arch = VARIANTS[name]
    assert Mellum2Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


def test_architecture_json_is_strict() -> None:
    values = TINY.to_dict()
    with pytest.raises(
        InputError, match=r"architecture\.hiden_size.*did you mean 'architecture\.hidden_size'"
    ):
        Mellum2Architecture.from_dict(values | {"hiden_size": 1})
    with pytest.raises(
        InputError, match=r"did you mean 'architecture\.rope_full_attention\.rope_theta'"
    ):
        Mellum2Architecture.from_dict(
            values | {"rope_full_attention": {"rope_type": "default", "rope_teta": 1.0}}
        )
    del values["hidden_size"]
    with pytest.raises(InputError, match=r"architecture\.hidden_size is missing"):
        Mellum2Architecture.from_dict(values)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'mellum2-12b'"):
        Mellum2Architecture.preset("melum2-12b")
    with pytest.raises(InputError, match="did you mean 'num_experts'"):
        TINY.replace(num_expert=4)


def test_replace_continues_the_pattern_of_layers() -> None:
    assert RELEASED.replace(num_hidden_layers=6).layer_types == (
        SLIDING,
        SLIDING,
        SLIDING,
        FULL,
        SLIDING,
        SLIDING,
    )
    assert TINY.replace(num_hidden_layers=8).layer_types == TINY.layer_types * 2
    assert TINY.replace(num_mtp_layers=0).mtp_layer_types == ()
    given = (FULL, SLIDING)
    assert TINY.replace(num_hidden_layers=2, layer_types=given).layer_types == given


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_experts": 1.5}, "num_experts=1.5"),
        ({"initializer_range": float("nan")}, "initializer_range=nan"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef=-1.0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
        ({"num_mtp_layers": 2}, "num_mtp_layers=2"),
        ({"mtp_layer_types": ()}, "mtp_layer_types with 0 entries"),
        ({"layer_types": (SLIDING,) * 3}, "layer_types with 3 entries"),
        ({"sliding_window": None}, "sliding_window=None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_values_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        TINY.replace(**changes)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_type": "default", "factor": 2.0}, "rope.factor=2.0"),
        ({"rope_type": "yarn"}, "rope.factor=None"),
        ({"rope_type": "yarn", "factor": 2.0}, "rope.original_max_position_embeddings=None"),
        ({"rope_type": "linear"}, "rope_type='linear'"),
        (
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 0.5,
            },
            "rope.beta_fast=0.5",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_ropes_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        RopeParameters(rope_theta=1e4, **fields)


def test_describing_a_model_imports_no_heavy_library() -> None:
    code = (
        "import sys, mellum2_megatron.architecture.mellum2 as a, mellum2_megatron.architecture.hf_config as h; h.to_hf_config(a.PRESETS['mellum2-12b']);"
        "print([m for m in ('torch', 'megatron', 'transformers', 'numpy') if m in sys.modules])"
    )
    root = REPOSITORY
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
