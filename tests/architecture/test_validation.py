"""The architecture's own checks, ``architecture.json``, and variants by `replace`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from mellum2_megatron.architecture import Mellum2Architecture, RopeParameters
from mellum2_megatron.common.errors import InputError
from tests import REPOSITORY, text_id
from tests.architecture.variants import FULL, RELEASED, SLIDING, TINY, VARIANTS


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
        ({"num_mtp_layers": 5}, "num_mtp_layers=5"),
        ({"num_mtp_layers": True}, "num_mtp_layers=true"),
        ({"mtp_layer_types": ()}, "mtp_layer_types with 0 entries"),
        ({"layer_types": (SLIDING,) * 3}, "layer_types with 3 entries"),
        ({"sliding_window": None}, "sliding_window=None"),
    ],
    ids=text_id,
)
def test_impossible_values_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        TINY.replace(**changes)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_type": "default", "factor": 2.0}, "rope.factor=2.0"),
        ({"rope_type": "yarn"}, "rope.factor=None"),
        ({"rope_type": "yarn", "factor": 2.0}, "rope.original_max_position_embeddings=null"),
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
    ids=text_id,
)
def test_impossible_ropes_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        RopeParameters(rope_theta=1e4, **fields)


def test_describing_a_model_imports_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from mellum2_megatron import architecture\n"
        "architecture.to_hf_config(architecture.PRESETS['mellum2-12b'])\n"
        "heavy = ('torch', 'megatron', 'transformers', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_patterns_of_layers_fit_any_depth() -> None:
    """One override of a study holds for models of every size."""
    assert TINY.replace(mlp_layer_types=("dense",)).mlp_layer_types == ("dense",) * 4
    mixed = TINY.replace(mlp_layer_types=("dense", "sparse"))
    assert mixed.mlp_layer_types == ("dense", "sparse") * 2
    assert mixed.replace(num_hidden_layers=3).mlp_layer_types == ("dense", "sparse", "dense")
    assert mixed.replace(hidden_size=128).mlp_layer_types == mixed.mlp_layer_types
    assert TINY.replace(mlp_layer_types=("sparse",)) == TINY
    assert TINY.replace(layer_types=(FULL,), num_hidden_layers=6).layer_types == (FULL,) * 6
    with pytest.raises(InputError, match="mlp_layer_types with 3 entries"):
        TINY.replace(mlp_layer_types=("dense",) * 3)
    with pytest.raises(InputError, match="mlp_layer_types='dense'"):
        TINY.replace(mlp_layer_types="dense")
