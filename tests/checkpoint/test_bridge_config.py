"""run_config.yaml against values written by hand, and its place beside checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mellum2_megatron.architecture import PRESETS, Mellum2Architecture
from mellum2_megatron.checkpoint.bridge_config import RUN_CONFIG_FILE, run_config, write_run_config
from mellum2_megatron.common.errors import InputError

LONG = PRESETS["mellum2-12b-128k"]


@pytest.fixture
def model(tmp_path: Path) -> dict[str, Any]:
    """The model section for the released architecture, read back from the file."""
    write_run_config(tmp_path, LONG)
    return yaml.safe_load((tmp_path / RUN_CONFIG_FILE).read_text())["model"]


def test_run_config_describes_the_model(model: dict[str, Any]):
    expected = {
        "_target_": "conversion.bridge.model.Mellum2ModelProvider",
        "num_layers": 28,
        "hidden_size": 2304,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "kv_channels": 128,
        "num_moe_experts": 64,
        "moe_router_topk": 8,
        "moe_ffn_hidden_size": 896,
        "mtp_num_layers": 1,
        "window_size": [1023, 0],
        "window_attn_skip_freq": 4,
        "qk_layernorm": True,
        "position_embedding_type": "rope",
        "rotary_base": 500000,
        "vocab_size": 98304,
        "seq_length": 131072,
        "share_embeddings_and_output_weights": False,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "bf16": True,
        "fp16": False,
        "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    }
    assert {name: model[name] for name in expected} == expected


def test_run_config_holds_the_architecture(model: dict[str, Any]):
    assert Mellum2Architecture.from_dict(model["architecture"]) == LONG
    assert model["architecture"]["rope_full_attention"]["factor"] == 16.0


def test_headless_and_irregular_models(tmp_path: Path):
    types = ("full_attention", "sliding_attention", "sliding_attention", "full_attention")
    architecture = PRESETS["mellum2-tiny"].replace(num_mtp_layers=0, layer_types=types)
    model = run_config(architecture, "float32")["model"]
    assert model["mtp_num_layers"] is None
    assert model["window_attn_skip_freq"] == [0, 1, 1, 0]
    assert (model["bf16"], model["fp16"], model["params_dtype"]["_target_"]) == (
        False,
        False,
        "torch.float32",
    )
    full = PRESETS["mellum2-tiny"].replace(
        layer_types=("full_attention",) * 4, mtp_layer_types=("full_attention",)
    )
    assert "window_size" not in run_config(full)["model"]


def test_run_config_offers_weights_alone():
    checkpoint = run_config(LONG)["checkpoint"]
    assert (
        checkpoint["save_optim"],
        checkpoint["save_rng"],
        checkpoint["fully_parallel_save"],
    ) == (False, False, True)


def test_unknown_dtype_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"dtype='float8'.*bfloat16"):
        write_run_config(tmp_path, LONG, "float8")
    assert not any(tmp_path.iterdir())


def test_writing_needs_neither_torch_nor_bridge(tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom mellum2_megatron.architecture import PRESETS\n"
        "from mellum2_megatron.checkpoint.bridge_config import write_run_config\n"
        "write_run_config(Path(sys.argv[1]), PRESETS['mellum2-tiny'])\n"
        "import json\n"
        "heavy = {'torch', 'megatron', 'omegaconf', 'transformers'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
    assert (tmp_path / RUN_CONFIG_FILE).is_file()


def test_import_writes_run_config_into_the_release(tmp_path: Path):
    """In the iteration's folder: Bridge takes a folder that holds the file for an iteration."""
    import torch

    from conversion.convert import import_hf
    from tests.conversion.folders import write_folder

    import_hf(write_folder(tmp_path / "hf", dtype=torch.float16), tmp_path / "megatron")
    model = yaml.safe_load((tmp_path / "megatron" / "release" / RUN_CONFIG_FILE).read_text())[
        "model"
    ]
    assert (model["num_layers"], model["mtp_num_layers"], model["fp16"]) == (3, 1, True)
    assert not (tmp_path / "megatron" / RUN_CONFIG_FILE).exists()


def test_save_writes_run_config_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch

    from mellum2_megatron.checkpoint import saving
    from mellum2_megatron.checkpoint.file_manifest import read_manifest
    from mellum2_megatron.checkpoint.folder import write_architecture

    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    write_architecture(tmp_path, PRESETS["mellum2-tiny"])
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda parts, own: parts.__setitem__(0, own)
    )
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    saving._write_manifest(folder)
    assert list(read_manifest(folder) or {}) == [RUN_CONFIG_FILE]
    assert yaml.safe_load((folder / RUN_CONFIG_FILE).read_text()) == run_config(
        PRESETS["mellum2-tiny"]
    )
