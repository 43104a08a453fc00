"""The te backend without a GPU: modules are built, not run, and compared with torch's."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest

from mellum2_megatron.planning.machine_rules import DETERMINISTIC_SCORES
from mellum2_megatron.recipes import recipe, recipe_names
from tests import REPOSITORY


def transformer_engine_imports() -> bool:
    command = [sys.executable, "-c", "import torch, transformer_engine.pytorch"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.te,
    pytest.mark.skipif(
        not transformer_engine_imports(),
        reason="Transformer Engine is not installed (make setup-te)",
    ),
]


def run_worker(function: str, *arguments: str) -> Any:
    """Call a function of `tests.te.worker` in its own process."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.te.worker", function, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(results[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return run_worker("tiny_models")


def test_both_backends_have_the_same_checkpoint_keys(tiny: dict[str, Any]):
    assert tiny["te"] == tiny["torch"]
    assert tiny["parameters"]["te"] == tiny["parameters"]["torch"]
    assert "decoder.layers.pre_mlp_layernorm.weight" in tiny["te"]
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in tiny["te"]


def test_both_backends_draw_equal_weights_by_name(tiny: dict[str, Any]):
    assert tiny["drawn_alike"] == tiny["matrices"] > 90


def test_te_layers_attend_by_their_type(tiny: dict[str, Any]):
    """Sliding and MTP layers have a window of 64; the full one none, and YaRN's factor squared."""
    assert tiny["windows"][:3] == [[63, 0]] * 3
    assert tiny["windows"][4] == [63, 0]
    assert tiny["windows"][3] in ([], [-1, 0], [-1, -1])
    plain = 1 / math.sqrt(64)
    factor = 0.1 * math.log(16) + 1
    assert tiny["scales"] == pytest.approx(
        [plain, plain, plain, plain * factor**2, plain], rel=1e-12
    )


def test_latent_attention_has_the_same_keys_and_windows():
    built = run_worker("latent_models")
    assert built["te"] == built["torch"]
    assert built["parameters"] == built["expected"]
    assert "decoder.layers.self_attention.linear_kv_up_proj.weight" in built["te"]
    assert built["windows"][:3] == [[63, 0]] * 3
    assert built["windows"][3] in ([], [-1, 0], [-1, -1])


def test_te_modules_are_fused_and_grouped(tiny: dict[str, Any]):
    expected = {
        "TELayerNormColumnParallelLinear",
        "TEColumnParallelGroupedLinear",
        "TERowParallelGroupedLinear",
    }
    assert expected <= set(tiny["modules"])
    assert tiny["routers_are_ours"]


def test_deterministic_attention_within_documents_is_unfused_beyond_the_rules_limit():
    """The rule `deterministic-documents-have-a-kernel` has Transformer Engine's own limit."""
    below, at = run_worker("deterministic_documents", str(DETERMINISTIC_SCORES))
    assert below == {"fused": True, "unfused": False}
    assert at == {"fused": False, "unfused": True}


def test_the_mtp_projection_alone_leaves_fp8():
    everything = {"eh_proj": True, "linear_qkv": True, "linear_proj": True}
    assert run_worker("projection_contexts") == [everything, everything | {"eh_proj": False}]


NO_DEEPEP = pytest.mark.skipif(
    importlib.util.find_spec("deep_ep") is None,
    reason="HybridEP is not installed: it is built for a GPU",
)


def production_stages() -> list[Any]:
    """Return one recipe for each layout, precision, model and optimizer, with each of its stages.

    The recipes that exchange tokens through HybridEP need its package to be built.
    """
    kinds: dict[Any, list[Any]] = {}
    for name in recipe_names():
        run = recipe(name)
        # Production recipes are for a number of GPUs; the others fit any.
        if run.layout.world_size is not None:
            kind = (run.layout, run.precision, run.architecture, run.optimizer)
            marks = [NO_DEEPEP] if run.layout.dispatcher == "flex" else []
            kinds.setdefault(
                kind, [pytest.param(name, stage, marks=marks) for stage in range(run.layout.pp)]
            )
    return [stage for stages in kinds.values() for stage in stages]


@pytest.mark.parametrize(("name", "stage"), production_stages())
def test_production_recipe_is_built_at_its_true_size(name: str, stage: int):
    """One rank passes Megatron's own validation at the real world size and with real dimensions."""
    built, run = run_worker("recipe_model", name, str(stage)), recipe(name)
    assert built["world"] == run.layout.world_size
    assert built["parameters"] == built["expected"]
    # Only buffers of whole matrices are padded by more than an alignment.
    if built["layer_wise"]:
        assert built["padding"] == built["expected_padding"]
    else:
        assert built["expected_padding"] == 0
    assert built["layer_wise"] is (run.optimizer.name == "muon")
    assert built["fp8"] == ("hybrid" if run.precision.compute == "fp8" else None)
    assert built["router_fusion"]
    assert built["grouped"]
    assert {"TEDotProductAttention", "TEGroupedMLP", "TELayerNormColumnParallelLinear"} <= set(
        built["modules"]
    )
