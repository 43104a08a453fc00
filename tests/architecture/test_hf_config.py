"""``config.json``: released files equal the presets, and transformers reads ours alike."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from typing import Any

import pytest

from mellum2_megatron.architecture import PRESETS, from_hf_config, to_hf_config
from mellum2_megatron.common.errors import InputError
from tests import text_id
from tests.architecture.variants import FULL, RELEASED, SLIDING, VARIANTS

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


@pytest.mark.parametrize(
    ("config", "preset"),
    [(BASE_PRETRAIN_CONFIG, "mellum2-12b"), (RELEASED_CONFIG, "mellum2-12b-128k")],
)
def test_released_configs_and_presets_convert_into_each_other(
    config: dict[str, Any], preset: str
) -> None:
    assert from_hf_config(config) == PRESETS[preset]
    assert to_hf_config(PRESETS[preset]) == config


@pytest.mark.parametrize("name", VARIANTS)
def test_config_round_trip_through_transformers(name: str) -> None:
    """transformers writes our config, aliases and all; it reads back as the same architecture."""
    from transformers import MellumConfig

    arch = VARIANTS[name]
    written = json.loads(MellumConfig(**to_hf_config(arch)).to_json_string(use_diff=False))
    assert from_hf_config(written) == arch
    assert from_hf_config(json.loads(json.dumps(to_hf_config(arch)))) == arch


def test_absent_keys_have_transformers_defaults() -> None:
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


def test_only_unknown_keys_are_named(
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
        ({"mlp_layer_types": ["sparse"] * 27 + ["moe"]}, "mlp_layer_types entry 'moe'"),
        ({"mlp_layer_types": ["dense"] * 28}, "mtp_mlp_layer_types[0]='sparse'"),
        ({"mtp_mlp_layer_types": ["dense"]}, "mtp_mlp_layer_types[0]='dense'"),
        ({"mlp_layer_types": ["sparse"] * 27}, "mlp_layer_types with 27 entries"),
        (
            {"num_nextn_predict_layers": 2, "mtp_layer_types": None, "mtp_mlp_layer_types": None},
            "num_mtp_layers=2",
        ),
        ({"num_nextn_predict_layers": True}, "num_mtp_layers=true"),
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
    ids=text_id,
)
def test_inexpressible_configs_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        from_hf_config(RELEASED_CONFIG | changes)


WRONG = (None, [], {}, "x", -1, 1.5, True, [None], {"a": 1}, [["a"]], [{}], 10**30, math.nan)


@pytest.mark.parametrize("key", to_hf_config(PRESETS["mellum2-tiny"], "bfloat16"))
def test_any_value_under_any_key_is_taken_or_refused(key: str) -> None:
    """No value ends in another exception."""
    config = to_hf_config(PRESETS["mellum2-tiny"], "bfloat16")
    for value in WRONG:
        with contextlib.suppress(InputError):
            from_hf_config({**config, key: value})
    if key not in ("layer_types", "mtp_layer_types"):
        return
    with pytest.raises(InputError, match="list of names"):
        from_hf_config({**config, key: [["a"]]})
