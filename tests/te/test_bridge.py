"""Megatron-Bridge against this project's converter, byte by byte; models are built, not run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.convert import export_hf, import_hf
from conversion.torch_dist.reader import TorchDistReader
from tests import REPOSITORY
from tests.conversion.folders import VARIANTS, load_tensors, write_folder
from tests.conversion.releases import write_model

EVEN = {
    "num_experts": 4,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "small": {},
    "even": EVEN,
    "one-layer": VARIANTS["seven_experts_one_layer"],
    "no-mtp": VARIANTS["no_mtp"],
}


def bridge_is_installed() -> bool:
    return all(
        importlib.util.find_spec(name)
        for name in ("transformer_engine", "megatron.bridge", "modelopt")
    )


pytestmark = [
    pytest.mark.te,
    pytest.mark.skipif(
        os.environ.get("MELLUM2_REQUIRE_BRIDGE") != "1" and not bridge_is_installed(),
        reason="no Megatron-Bridge here: scripts/setup_te.sh, then scripts/setup_bridge.sh",
    ),
]


def run_worker(root: Path, *functions: str, ranks: int = 1) -> dict[str, Any]:
    """Call functions of `tests.te.bridge_worker` on a folder, in one process or in several."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.te.bridge_worker", str(root), *functions],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(results[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as Hugging Face folders and as our imports, and three damaged folders."""
    root = tmp_path_factory.mktemp("bridge")
    for name, changes in MODELS.items():
        import_hf(write_model(root / "hf" / name, **changes), root / "imported" / name)
    write_folder(root / "fused", fused=True)
    for name in ("missing", "extra"):
        folder = write_folder(root / name)
        tensors = load_tensors(folder)
        if name == "missing":
            del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
        else:
            tensors["model.layers.3.mlp.gate.weight"] = torch.ones(3, 24, dtype=torch.bfloat16)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module")
def done(root: Path) -> dict[str, Any]:
    """The results of all functions that need one process."""
    functions = (
        "known_before",
        "round_trips",
        "configurations",
        "old_path",
        "refusals",
        "without_head",
        "synthesized",
    )
    return run_worker(root, *functions)


def require_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare names, dtypes, shapes and bytes."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(folder)
    whole = {key: (0,) * len(info.shape) for key, info in reader.tensors.items()}
    return {
        key: reader.read(key, offset, reader.tensors[key].shape) for key, offset in whole.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_bridge_loads_what_our_importer_writes(name: str, root: Path, done: dict[str, Any]):
    """AutoBridge's model, saved by Bridge, has the keys and the bytes of our import."""
    ours = checkpoint_tensors(root / "imported" / name / "release")
    assert any(key.startswith("mtp.") for key in ours) is (name != "no-mtp")
    require_same(checkpoint_tensors(root / "bridge_megatron" / name / "iter_0000000"), ours)


@pytest.mark.parametrize("name", MODELS)
def test_bridge_exports_what_it_was_given(name: str, root: Path, done: dict[str, Any]):
    """From the model it loaded, and from our import, whose run_config.yaml names the provider."""
    original = load_tensors(root / "hf" / name)
    require_same(load_tensors(root / "bridge_hf" / name), original)
    require_same(load_tensors(root / "read_back" / name), original)
    export_hf(root / "imported" / name, root / "exported" / name)
    require_same(load_tensors(root / "exported" / name), original)
    assert (root / "bridge_hf" / name / "config.json").read_text() == (
        root / "hf" / name / "config.json"
    ).read_text()


@pytest.mark.distributed
def test_bridge_splits_the_model(root: Path):
    """Pipeline, expert and tensor parallelism on two ranks: the gathered export is the original."""
    run_worker(root, "split", ranks=2)
    for way in ("pipeline", "expert", "tensor"):
        require_same(
            load_file(root / f"{way}_model_parallel_size.safetensors"),
            load_tensors(root / "hf" / "even"),
        )


def test_provider_is_configured_as_our_training_is(done: dict[str, Any]):
    assert done["configurations"]["arguments"] == []


def test_bridge_reads_the_run_config(done: dict[str, Any], root: Path):
    """Read leniently and strictly, it gives the provider that the Hugging Face folder gives."""
    assert done["configurations"]["load_model_config"] == []
    assert done["configurations"]["ConfigContainer"] == []
    config = json.loads((root / "hf" / "small" / "config.json").read_text())
    assert {key: done["synthesized"][key] for key in config} == config


def test_bridge_reads_a_checkpoint_that_names_the_providers_old_path(
    done: dict[str, Any], root: Path
):
    """Checkpoints name ``conversion.bridge_model``, which has moved; they are read as before."""
    assert done["old_path"] == []
    require_same(load_tensors(root / "old_path_hf"), load_tensors(root / "hf" / "small"))


def test_bridge_has_no_mellum_of_its_own(done: dict[str, Any]):
    """Once it has one, ours should be dropped."""
    assert done["known_before"] is False


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        ("missing", ["model.layers.1.mlp.experts.2.up_proj.weight missing"]),
        ("extra", ["model.layers.3.mlp.gate.weight not part of the Megatron model"]),
        ("fused", ["missing", "unfuse"]),
        ("unmapped", ["mtp.layers.0.eh_proj.weight", "has no row for it"]),
        ("another model", ["moe_router_topk is 3, needs 2"]),
        ("no architecture", ["architecture=None"]),
    ],
)
def test_incomplete_conversion_is_refused(attempt: str, words: list[str], done: dict[str, Any]):
    error = done["refusals"][attempt]
    assert error.startswith("InputError: ")
    assert all(word in error for word in words), error


def test_head_is_left_out_only_when_asked(done: dict[str, Any], root: Path):
    trunk = [name for name in load_tensors(root / "hf" / "small") if not name.startswith("mtp.")]
    assert done["without_head"] == {"parameters": [], "exported": sorted(trunk), "config": None}
