"""`mellum2 train`: from a recipe's name to running ranks, everything checked before the first of
them starts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mellum2_megatron.checkpoint import check_run_folder, output_folder, write_run_folder
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.config import Run, to_yaml
from mellum2_megatron.faults.stop_request import STOPPED
from mellum2_megatron.planning.resolve import default_nproc, plan, resolve_device, resolve_run
from mellum2_megatron.planning.rules import enforce
from mellum2_megatron.planning.stage_chain import check_predecessor
from mellum2_megatron.upstream import megatron_arguments


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
        0, or 75 after SIGTERM or SIGUSR1 and a save, or 128 + the number of the signal that
        interrupted the ranks.

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
    """Print the resolved run and Megatron's arguments, checked for the machine that the run is
    meant for."""
    where, ranks = plan(run, device, nproc)
    enforce(run, world_size=ranks, device=where, machine=False)
    sys.stdout.write(to_yaml(run))
    words = megatron_arguments(run, world_size=ranks, device=where)
    sys.stdout.write(f"# {ranks} {where} rank(s); Megatron-LM arguments:\n# {shlex.join(words)}\n")
