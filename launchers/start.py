"""`mellum2 train`: resolve a run, check it, then start its ranks on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launchers.local import run_local
from mellum2_megatron.checkpoint import (
    StartingPoint,
    check_run_folder,
    output_folder,
    write_run_folder,
)
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.config import to_yaml
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
        name: recipe, or the path of a resolved run (`*.yaml`).
        overrides: `key=value` words.
        nproc: number of ranks; None: one per GPU, or on a CPU the fewest that the layout allows.
        device: "auto", "cpu" or "cuda".
        output: run folder, default the run's own, else `runs/NAME`.
        dry_run: only print the resolved run and Megatron's arguments.
        verbose: keep Megatron's own output.

    Returns:
        0, or 75 after SIGTERM or SIGUSR1 and a save, or 128 + signal number after an interrupt.

    Raises:
        InputError: a run that cannot work, found before any rank starts.
        WorkError: the ranks failed.
    """
    run = resolve_run(name, overrides, output=output)
    if dry_run:
        # machine=False: the run may be meant for another machine, with GPUs.
        planned_device, ranks = plan(run, device, nproc)
        enforce(run, world_size=ranks, device=planned_device, machine=False)
        sys.stdout.write(to_yaml(run))
        words = shlex.join(megatron_arguments(run, world_size=ranks, device=planned_device))
        sys.stdout.write(f"# {ranks} {planned_device} rank(s); Megatron-LM arguments:\n# {words}\n")
        return 0
    resolved_device = resolve_device(device)
    ranks = nproc or default_nproc(run, resolved_device)
    start = StartingPoint.of(run)
    enforce(run, world_size=ranks, device=resolved_device, start=start)
    check_predecessor(run, start)
    check_run_folder(run, start)
    write_run_folder(run)
    code = run_local(
        output_folder(run) / RUN_FILE, nproc=ranks, device=resolved_device, verbose=verbose
    )
    if code == STOPPED:
        sys.stderr.write("stopped as asked, all is saved; the same command resumes from here\n")
    elif code:
        sys.stderr.write("interrupted; the same command resumes from the last checkpoint\n")
    return code
