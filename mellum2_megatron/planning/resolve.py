"""Resolution of a recipe's name or a run file to a run, its number of ranks and its device."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from mellum2_megatron.checkpoint.run_folder import read_run_in_place
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Device, Run, apply_overrides
from mellum2_megatron.planning.rules import check
from mellum2_megatron.recipes import recipe

logger = logging.getLogger(__name__)


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


def named_run(name: str) -> Run:
    """Return the run that a word of the command line names.

    Args:
        name: recipe, ``FILE.py:FUNCTION`` for a recipe in a file, or path of a resolved run
            (``.yaml`` or ``.yml``). The ``run.yaml`` of a run folder means that folder, wherever it
            was moved or copied; a warning states it.

    Raises:
        InputError: an unknown recipe, or a file that is unreadable or fails.
    """
    if not name.endswith((".yaml", ".yml")):
        return recipe(name)
    run, note = read_run_in_place(Path(name))
    if note:
        logger.warning(note)
    return run


def resolve_run(name: str, overrides: Sequence[str], *, output: Path | None = None) -> Run:
    """Return the run of a recipe or a YAML file, with overrides and an output folder.

    Args:
        name: see `named_run`.
        overrides: ``key=value`` words.
        output: folder of the run; None (default): ``checkpoint.output``, else ``runs/NAME``.

    Raises:
        InputError: see `named_run`; or a bad override.
    """
    run = apply_overrides(named_run(name), overrides)
    key = "checkpoint.output="
    given = next((word for word in reversed(overrides) if word.startswith(key)), None)
    if output is not None and given is not None and Path(given.removeprefix(key)) != output:
        logger.warning("--output %s holds, not %s", output, given)
    folder = output or Path(run.checkpoint.output or Path("runs") / run.name)
    return with_home(
        dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, output=str(folder)))
    )


def with_home(run: Run) -> Run:
    """Return the run with ``~`` at the start of a path written out.

    No shell does it behind ``key=``.
    """
    data, checkpoint = run.data, run.checkpoint

    def blend(pairs: tuple[tuple[float, str], ...]) -> tuple[tuple[float, str], ...]:
        return tuple((weight, os.path.expanduser(entry)) for weight, entry in pairs)

    def path(given: str | None) -> str | None:
        return None if given is None else os.path.expanduser(given)

    return dataclasses.replace(
        run,
        data=dataclasses.replace(
            data,
            path=os.path.expanduser(data.path),
            tokenizer=path(data.tokenizer),
            train=blend(data.train),
            valid=blend(data.valid),
            cache=path(data.cache),
        ),
        checkpoint=dataclasses.replace(
            checkpoint,
            output=path(checkpoint.output),
            load=path(checkpoint.load),
            continue_from=path(checkpoint.continue_from),
        ),
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
