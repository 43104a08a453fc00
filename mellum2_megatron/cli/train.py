"""`mellum2 train`: train on this machine."""

from __future__ import annotations

import typer

from mellum2_megatron.cli.options import (
    DeviceChoice,
    DryRun,
    Nproc,
    Overrides,
    RecipeOrRun,
    RunOutput,
    Verbose,
)


def train(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    nproc: Nproc = None,
    device: DeviceChoice = "auto",
    output: RunOutput = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Train on this machine, or resume the run in the output folder.

    The same command resumes from the last checkpoint of its output folder.
    Exit code 75: the run was stopped (SIGTERM, SIGUSR1) and saved a checkpoint.
    """
    from launchers.start import start_local

    code = start_local(
        recipe,
        overrides or [],
        nproc=nproc,
        device=device,
        output=output,
        dry_run=dry_run,
        verbose=verbose,
    )
    # Unchanged: batch jobs start again on 75, and shells read 128 + N as signal N.
    raise typer.Exit(code)
