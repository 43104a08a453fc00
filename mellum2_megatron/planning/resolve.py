"""Resolution of a recipe's name or a run file to a run, its number of ranks and its device."""

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
    """Return the device and the number of ranks that a run is meant for.

    Neither has to exist on this machine. ``auto`` is this machine's device, with one exception: it
    is ``cuda`` for a run that breaks a rule on a CPU and none on GPUs, such as an FP8 run.

    Args:
        run: a resolved run.
        device: ``auto``, ``cpu`` or ``cuda``.
        nproc: number of ranks; None: that of the layout.

    Raises:
        InputError: ``device`` is another word.
    """
    ranks = nproc or run.layout.world_size or run.layout.smallest_world_size
    if device == "cuda":
        return "cuda", ranks
    resolved = resolve_device(device)
    if (
        device == "auto"
        and resolved == "cpu"
        and check(run, ranks, "cpu", machine=False)
        and not check(run, ranks, "cuda", machine=False)
    ):
        return "cuda", ranks
    return resolved, ranks


def resolve_run(name: str, overrides: Sequence[str], *, output: Path | None = None) -> Run:
    """Return the run of a recipe or a YAML file, with overrides and an output folder.

    Args:
        name: recipe, or path of a resolved run (``.yaml`` or ``.yml``).
        overrides: ``key=value`` words.
        output: folder of the run; None (default): ``checkpoint.output``, else ``runs/NAME``.

    Raises:
        InputError: an unknown recipe, an unreadable file, or a bad override.
    """
    run = read_run(Path(name)) if name.endswith((".yaml", ".yml")) else recipe(name)
    run = apply_overrides(run, overrides)
    folder = output or Path(run.checkpoint.output or Path("runs") / run.name)
    return dataclasses.replace(
        run, checkpoint=dataclasses.replace(run.checkpoint, output=str(folder))
    )


def resolve_device(device: str) -> Device:
    """Return ``cpu`` or ``cuda``; ``auto`` takes a GPU if there is one.

    Raises:
        InputError: ``device`` is another word, or ``cuda`` without a usable GPU.
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
    """Return true if NVIDIA's driver library loads.

    Without it torch finds no GPU either, and importing torch takes seconds.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def default_nproc(run: Run, device: Device) -> int:
    """Return the number of ranks that `mellum2 train` starts by default.

    On GPUs it is the number of GPUs. On a CPU it is the layout's world size, or without one the
    fewest ranks that the layout can run on.
    """
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    return run.layout.world_size or run.layout.smallest_world_size
