"""Facts of this machine that need torch and Transformer Engine, found in a process of its own.

::

    python -m mellum2_megatron.gpu_check.machine    # prints one JSON object

The check itself never starts CUDA: its context would take memory from what is measured.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from typing import Any

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.json_files import parse_object

KERNELS = {
    "attention": "TEDotProductAttention",
    "grouped GEMM of the experts": "TEColumnParallelGroupedLinear",
    "norm and projection in one": "TELayerNormColumnParallelLinear",
    "router": "fused_topk_with_score_function",
    "load-balancing loss": "fused_moe_aux_loss",
    "exchange order of tokens": "fused_permute_with_probs",
    "padding for FP8": "Fp8Padding",
    "rotary embedding": "fused_apply_rotary_pos_emb",
    "rotary embedding of packed documents": "fused_apply_rotary_pos_emb_thd",
}
"""Purpose -> name in megatron.core.extensions.transformer_engine (0.19.2), which is None or absent
where Transformer Engine has no such kernel."""

MARK = "MACHINE "
"""Beginning of the printed line: libraries may print lines of their own before it."""


def facts() -> dict[str, Any]:
    """Return the facts of this machine, found in a new process.

    Returns:
        ``gpus``, each with ``name``, ``memory_bytes`` and ``capability`` as ``[major, minor]``;
        ``driver``, ``cuda`` and ``nccl`` versions, null without a GPU; ``transformer_engine``: its
        version, null if it cannot be imported, and then ``transformer_engine_error``; ``fp8``:
        null, or the reason why FP8 does not work here; ``kernels`` by purpose, true or false.

    Raises:
        WorkError: the process failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "mellum2_megatron.gpu_check.machine"],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise WorkError(
            f"this machine cannot be examined: {last}",
            fix="run `python -m mellum2_megatron.gpu_check.machine` and see its error",
        )
    return parse_object(lines[-1].removeprefix(MARK))


def rehearsal_facts() -> dict[str, Any]:
    """Return the facts of a rehearsal, which uses no GPU."""
    return {"gpus": [], "host": platform.machine()}


def examine() -> dict[str, Any]:
    """Return the facts of this machine, in this process; keys as for `facts`."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": [properties.major, properties.minor],
            }
        )
    found: dict[str, Any] = {
        "gpus": gpus,
        "driver": _driver() if gpus else None,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,  # type: ignore[no-untyped-call]
        "transformer_engine": None,
        "fp8": "Transformer Engine cannot be imported",
        "kernels": dict.fromkeys(KERNELS, False),
    }
    try:
        engine = importlib.import_module("transformer_engine.pytorch")
        layers = importlib.import_module("megatron.core.extensions.transformer_engine")
    except Exception as error:  # a broken build may fail in any way
        return found | {"transformer_engine_error": f"{type(error).__name__}: {error}"[:300]}
    version = importlib.metadata.version("transformer-engine")
    found["transformer_engine"] = version
    found["kernels"] = {
        purpose: getattr(layers, name, None) is not None for purpose, name in KERNELS.items()
    }
    found["fp8"] = "no GPU"
    if gpus:
        available, reason = engine.is_fp8_available(return_reason=True)
        found["fp8"] = None if available else reason
    return found


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, if its tool is there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0] if done.stdout.split() else None


if __name__ == "__main__":
    sys.stdout.write(f"{MARK}{json.dumps(examine())}\n")
