"""`mellum2 train`: from a recipe's name to running ranks, everything checked before the first of them starts."""

from __future__ import annotations

import ctypes
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mellum2_megatron.checkpoint_folder import RUN_FILE
from mellum2_megatron.errors import InputError
from mellum2_megatron.megatron_args import megatron_arguments
from mellum2_megatron.overrides import apply_overrides
from mellum2_megatron.recipes import recipe
from mellum2_megatron.rules import check, enforce
from mellum2_megatron.run import Device, Run, to_yaml
from mellum2_megatron.run_folder import check_run_folder, output_folder, read_run, write_run_folder
from mellum2_megatron.stages import check_predecessor
from mellum2_megatron.stopping import STOPPED


def start_local(
    name: str,
    overrides: Sequence[str],
    *,
    nproc: int | None,
    device: str,
    output: Path | None,
    dry_run: bool,
    verbose: bool,
) -> int:
    """Resolve, check and train a run on this machine.

    Args:
        name: a recipe, or the path of a resolved run (`*.yaml`).
        overrides: `key=value` words.
        nproc: ranks; all GPUs, or the fewest the layout needs on a CPU, if None.
        device: "auto", "cpu" or "cuda".
        output: folder of the run; `runs/NAME` if None and the run names none.
        dry_run: print what would be run, and do nothing.
        verbose: keep Megatron's own output.

    Returns:
        0, or 75 after SIGTERM or SIGUSR1 and a save, or 128 + the number of the signal that interrupted the ranks.

    Raises:
        InputError: anything that cannot work.
        WorkError: the ranks failed.
    """
    run = resolve_run(name, overrides, output=output)
    if dry_run:
        _show(run, device, nproc)
        return 0
    where = resolve_device(device)
    ranks = nproc or default_nproc(run, where)
    enforce(run, world_size=ranks, device=where)
    check_predecessor(run)
    check_run_folder(run)
    write_run_folder(run)
    from launchers.local import run_local

    code = run_local(output_folder(run) / RUN_FILE, nproc=ranks, device=where, verbose=verbose)
    if code == STOPPED:
        sys.stderr.write("stopped as asked, all is saved; the same command goes on from there\n")
    elif code:
        sys.stderr.write("interrupted; the same command resumes from the last checkpoint\n")
    return code


def _show(run: Run, device: str, nproc: int | None) -> None:
    """Print the resolved run and Megatron's arguments, checked for the machine that the run is meant for."""
    where, ranks = plan(run, device, nproc)
    enforce(run, world_size=ranks, device=where, machine=False)
    sys.stdout.write(to_yaml(run))
    words = megatron_arguments(run, world_size=ranks, device=where)
    sys.stdout.write(f"# {ranks} {where} rank(s); Megatron-LM arguments:\n# {shlex.join(words)}\n")


def plan(run: Run, device: str, nproc: int | None) -> tuple[Device, int]:
    """Return the device and the ranks that a run is meant for, whether this machine has them or not.

    "auto" means this machine, unless the run breaks a rule here that it keeps on GPUs (FP8, say): then it means those.

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
    """Return the run of a recipe or a YAML file with overrides applied and an output folder named."""
    run = read_run(Path(name)) if name.endswith((".yaml", ".yml")) else recipe(name)
    run = apply_overrides(run, overrides)
    folder = output or Path(run.checkpoint.output or Path("runs") / run.name)
    return dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, output=str(folder)))


def resolve_device(device: str) -> Device:
    """Return "cpu" or "cuda"; "auto" takes a GPU where there is one.

    Raises:
        InputError: another word, or "cuda" without a usable GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device}", rule="there are auto, cpu and cuda", fix="use one of them")
    if device != "cpu" and _has_driver():
        import torch

        if torch.cuda.is_available():
            return "cuda"
    if device == "cuda":
        raise InputError("--device cuda", rule="no GPU is usable here", fix="use --device cpu")
    return "cpu"


def _has_driver() -> bool:
    """Whether NVIDIA's driver library loads: without it torch finds no GPU either, and takes seconds to say so."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def default_nproc(run: Run, device: Device) -> int:
    """Return the ranks that `train` starts when not told: every GPU, or the fewest that the layout needs on a CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    return run.layout.world_size or run.layout.smallest_world_size
