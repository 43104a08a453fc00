"""What Transformer Engine's modules keep for the backward pass, against the count of memory.

Its autograd functions run without a GPU, with kernels that return empty tensors: the Python around
them decides what is saved, and in which number format.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from mellum2_megatron.config import Execution, Layout
from mellum2_megatron.planning import activations
from mellum2_megatron.planning.activations import Kept, Modules, kept_size
from tests import REPOSITORY
from tests.layouts.worker import ARCHITECTURE
from tests.te.test_te_backend import pytestmark as pytestmark

CASES = ("bf16", "fp8", "bf16 moe_act,layernorm", "fp8 moe_act,layernorm")
TOKENS = 64


@pytest.fixture(scope="module")
def saved() -> dict[str, dict[str, int]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.te.memory_worker", *CASES],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, int]] = json.loads(results[-1].removeprefix("RESULT "))
    return found


@pytest.mark.parametrize("case", CASES)
def test_te_modules_keep_what_is_counted(case: str, saved: dict[str, dict[str, int]]) -> None:
    compute, _, again = case.partition(" ")
    recompute: Any = tuple(word for word in again.split(",") if word)
    execution = Execution(recompute=recompute)
    modules = Modules(backend="te", fp8=compute == "fp8", balanced=True, z_loss=True, sequences=2)

    def measured(*starts: str) -> float:
        found = saved[case].items()
        return sum(size for name, size in found if name.startswith(starts)) / TOKENS

    def equals(tensors: list[Kept], *starts: str) -> None:
        # Scales of FP8 tensors and a few scalars are not counted.
        assert measured(*starts) == pytest.approx(kept_size(tensors, execution), abs=1.0)

    a = ARCHITECTURE
    attention = activations.attention_tensors(a, modules)
    router = activations.router_tensors(a, modules)
    experts = activations.expert_tensors(a, Layout(), modules, rows=a.num_experts_per_tok)
    for layer in ("decoder.layers.1.", "mtp.layers.0.mtp_model_layer."):
        equals(attention, f"{layer}self_attention")
        equals(router + experts, f"{layer}mlp")
        for name, part in (
            ("linear_fc1", "input of the first product"),
            ("linear_fc2", "input of the second product"),
        ):
            equals([one for one in experts if one.name == part], f"{layer}mlp.experts.{name}")
        if not recompute:
            # A norm that is computed again holds its input where autograd's hooks do not see it.
            equals(
                activations.norm_tensors("norm", a.hidden_size, modules),
                f"{layer}pre_mlp_layernorm",
            )
    around = ("enorm", "hnorm", "eh_proj", "final_layernorm")
    equals(activations.mtp_tensors(a, modules), *(f"mtp.layers.0.{part}" for part in around))
