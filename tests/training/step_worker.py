"""One rank of the tests of a micro-batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def use_arguments(
    *, tp: int = 1, pp: int = 1, cp: int = 1, micro_batch: int, length: int, mtp: int | None = 1
) -> None:
    """Set the arguments of Megatron that `training.step` reads."""
    from megatron.training import global_vars

    global_vars._GLOBAL_ARGS = SimpleNamespace(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        micro_batch_size=micro_batch,
        seq_length=length,
        mtp_num_layers=mtp,
    )


def part(
    layout: dict[str, int], sample: dict[str, torch.Tensor], mtp: int | None
) -> tuple[dict[str, int], dict[str, Any]]:
    """Return this rank's place in each parallelism, and its part of a micro-batch.

    Tensor-parallel ranks other than the first have nothing to read.
    """
    from megatron.core import parallel_state as mpu

    from mellum2_megatron.training.step import get_batch

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.get("tp", 1),
        pipeline_model_parallel_size=layout.get("pp", 1),
        context_parallel_size=layout.get("cp", 1),
    )
    rows, length = sample["tokens"].shape
    use_arguments(**layout, micro_batch=rows, length=length, mtp=mtp)
    ranks = {
        "tp": mpu.get_tensor_model_parallel_rank(),
        "pp": mpu.get_pipeline_model_parallel_rank(),
        "cp": mpu.get_context_parallel_rank(),
    }
    return ranks, get_batch(iter([sample] if ranks["tp"] == 0 else []))
