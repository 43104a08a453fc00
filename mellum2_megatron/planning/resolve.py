"""From a recipe's name or a run file to a resolved run, and the ranks and device it is meant
for."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Device, Run, apply_overrides
from mellum2_megatron.planning.rules import check
from mellum2_megatron.recipes import recipe


def plan(run: Run, device: str, nproc: int | None) -> tuple[Device, int]:
    """Return the device and the ranks that a run is meant for, whether this machine has them or
    not.

    "auto" means this machine, unless the run breaks a rule here that it keeps on GPUs (FP8, say):
    then it means those.

    Raises:
        InputError: `device` is none of "auto", "cpu" and "cuda".
    """
    ranks = nproc or run.layout.world_size or run.layout.smallest_world_size
    if device == "cuda":
        return "cuda", ranks
    here = resolve_device(device)
    if device == "auto" and here == "cpu" and check(run, ranks, "cpu", machine=False):
        return ("cpu" if check(run, ranks, "cuda", machine=False) else "cuda"), ranks
    return here, ranks


def resolve_run(name: str, overrides: Sequence[str], *, output: Path | None = None) -> Run:
    """Return the run of a recipe or a YAML file with overrides applied and an output folder
    named."""
    run = read_run(Path(name)) if name.endswith((".yaml", ".yml")) else recipe(name)
    run = apply_overrides(run, overrides)
    folder = output or Path(run.checkpoint.output or Path("runs") / run.name)
    return dataclasses.replace(
        run, checkpoint=dataclasses.replace(run.checkpoint, output=str(folder))
    )


def resolve_device(device: str) -> Device:
    """Return "cpu" or "cuda"; "auto" takes a GPU where there is one.

    Raises:
        InputError: another word, or "cuda" without a usable GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"--device {device}", rule="there are auto, cpu and cuda", fix="use one of them"
        )
    if device != "cpu" and _has_driver():
        import torch

        if torch.cuda.is_available():
            return "cuda"
    if device == "cuda":
        raise InputError("--device cuda", rule="no GPU is usable here", fix="use --device cpu")
    return "cpu"


def _has_driver() -> bool:
    """Whether NVIDIA's driver library loads: without it torch finds no GPU either, and takes
    seconds to say so."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def default_nproc(run: Run, device: Device) -> int:
    """Return the ranks that `train` starts when not told: every GPU, or the fewest that the layout
    needs on a CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    return run.layout.world_size or run.layout.smallest_world_size
