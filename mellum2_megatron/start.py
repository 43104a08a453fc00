"""`mellum2 train`: from a recipe's name to running ranks, everything checked before the first of them starts."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mellum2_megatron.data.datasets import check_data
from mellum2_megatron.errors import InputError
from mellum2_megatron.megatron_args import megatron_arguments
from mellum2_megatron.overrides import apply_overrides
from mellum2_megatron.recipes import recipe, recipe_names
from mellum2_megatron.rules import enforce
from mellum2_megatron.run import Device, Run, to_yaml
from mellum2_megatron.run_folder import RUN_FILE, check_run_folder, output_folder, read_run, write_run_folder


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
        Exit code of the ranks, 0 for a dry run.

    Raises:
        InputError: anything that cannot work.
    """
    run = resolve_run(name, overrides, output=output)
    where = resolve_device(device)
    ranks = nproc or default_nproc(run, where)
    enforce(run, world_size=ranks, device=where, machine=not dry_run)
    if dry_run:
        sys.stdout.write(to_yaml(run))
        words = megatron_arguments(run, world_size=ranks, device=where)
        sys.stdout.write(f"# {ranks} {where} rank(s); Megatron-LM arguments:\n# {shlex.join(words)}\n")
        return 0
    check_data(run)
    check_run_folder(run)
    write_run_folder(run)
    from launchers.local import run_local

    code = run_local(output_folder(run) / RUN_FILE, nproc=ranks, device=where, verbose=verbose)
    return 0 if code == 0 else 1


def resolve_run(name: str, overrides: Sequence[str], *, output: Path | None = None) -> Run:
    """Return the run of a recipe or a YAML file with overrides applied and an output folder named."""
    if name.endswith((".yaml", ".yml")):
        run = read_run(Path(name))
    else:
        run = recipe(name)
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
    if device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise InputError("--device cuda", rule="no GPU is usable here", fix="use --device cpu")
    return "cpu"


def default_nproc(run: Run, device: Device) -> int:
    """Return the ranks that `train` starts when not told: every GPU, or the fewest that the layout needs on a CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    return run.layout.world_size or run.layout.smallest_world_size


def is_recipe(name: str) -> bool:
    """Whether a recipe has this name."""
    return name in recipe_names()
