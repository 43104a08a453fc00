"""`mellum2 doctor`: packages and hardware of this machine, and the rules a run would break."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.cli.complete import complete_recipe
from mellum2_megatron.cli.options import Card, DeviceChoice, Nproc, Overrides
from mellum2_megatron.common.console import console, plain_table, print_line
from mellum2_megatron.common.errors import InputError

_PACKAGES = ("torch", "megatron-core", "emerging-optimizers", "transformers")
"""Required packages; the optional ones are in `planning.optional_packages`."""


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|FILE.py:RECIPE|RUN.yaml",
            help="recipe or resolved run to check too",
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Overrides = None,
    nproc: Nproc = None,
    device: DeviceChoice = "auto",
    gpu: Card = None,
) -> None:
    """Report what this machine lacks and which rules a run breaks.

    Each broken rule comes with its fix and its evidence.
    With --gpu the run is for such cards: it must fit their memory, and ranks are the layout's.
    Exit code 2 if the run breaks any.
    """
    if gpu is not None:
        from mellum2_megatron.planning.gpus import find_gpu

        # Before anything is printed.
        find_gpu(gpu)
        if device == "cpu":
            raise InputError(
                f"--gpu {gpu} with --device cpu", rule="a card is no CPU", fix="drop one of the two"
            )
    _print_machine()
    if recipe is not None and not diagnose(
        recipe, overrides or [], nproc=nproc, device=device, gpu=gpu
    ):
        raise typer.Exit(2)


def diagnose(
    recipe: str,
    overrides: Sequence[str],
    *,
    nproc: int | None,
    device: str,
    gpu: str | None = None,
) -> bool:
    """Print every rule that a run breaks; return True if it breaks none.

    Args:
        recipe: see `planning.resolve.named_run`.
        overrides: `key=value` words.
        nproc: number of ranks; None: that of the layout.
        device: `auto`, `cpu` or `cuda`.
        gpu: card of each rank, default none. The run is then for a machine with such cards: what
            this one lacks is no fault of the run.

    Raises:
        InputError: `device` is none of "auto", "cpu" and "cuda", or an unknown card.
    """
    from launchers.weights import huggingface_source
    from mellum2_megatron.data.feed.index_plan import index_command, index_notes
    from mellum2_megatron.data.feed.sources import check_amounts, check_data
    from mellum2_megatron.planning.gpus import find_gpu
    from mellum2_megatron.planning.memory import memory_per_rank
    from mellum2_megatron.planning.memory_fit import GIB, TooLittleMemoryError, parts_text
    from mellum2_megatron.planning.resolve import plan, resolve_run
    from mellum2_megatron.planning.rules import check
    from mellum2_megatron.planning.stage_chain import check_start
    from mellum2_megatron.planning.start_notes import start_notes
    from mellum2_megatron.upstream.parser_check import require_parsed

    # A run that cannot be resolved is a result of `doctor` too, so it goes to standard output.
    try:
        run = resolve_run(recipe, overrides)
        require_parsed(run)
        source = huggingface_source(run)
    except InputError as error:
        print_line(f"refused  {error}")
        return False
    if source is not None:
        print_line(f"checkpoint.load: {source} is a Hugging Face folder; a start imports it first")
    elif gpu is None:  # else the run starts from another machine's disks
        try:
            fault = check_start(run, overrides)
        except InputError as error:
            print_line(f"refused  {error}")
            return False
        if fault is not None:
            print_line(fault)
    card = None
    if gpu is None:
        planned_device, ranks = plan(run, device, nproc)
        violations = check(run, ranks, planned_device)
        title = f"{run.name} on {ranks} {planned_device} rank(s)"
    else:
        card = find_gpu(gpu)
        ranks = nproc or run.layout.world_size or run.layout.smallest_world_size
        violations = check(run, ranks, "cuda", machine=False, gpu=card)
        title = f"{run.name} on {ranks} {card.label}"
    if not violations:
        if card is None:
            data = check_data(run)
            index = index_notes(run, data, index_command([recipe, *overrides]))
            for note in (*data.notes, *check_amounts(run, data), *index):
                print_line(note)
        else:
            memory = memory_per_rank(run, world_size=ranks, backend=run.resolved_backend("cuda"))
            print_line(f"a rank needs {parts_text(memory)} of {card.memory / GIB:,.1f} GiB")
        for note in start_notes(run, ranks, card):
            print_line(note)
        print_line(f"{title}: breaks no rule")
        return True
    table = plain_table(title=title)
    for column in ("rule", "what is wrong", "fix", "evidence"):
        table.add_column(column, overflow="fold")
    for violation in violations:
        table.add_row(
            violation.rule.name,
            f"{violation.problem.value}: {violation.problem.rule}",
            violation.problem.fix,
            violation.rule.evidence,
        )
    console.print(table)
    # Once more, because a cell breaks lines and these are to be copied.
    for violation in violations:
        if isinstance(violation.problem, TooLittleMemoryError):
            for settings in violation.problem.settings:
                print_line(f"fits with  {settings}")
    return False


def _print_machine() -> None:
    """Print Python, cores, disk, GPUs and packages of this machine."""
    import torch
    from rich.markup import escape

    from mellum2_megatron.planning.optional_packages import find_optional_packages

    table = plain_table(title="This machine", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    table.add_row("python", f"{platform.python_version()} on {platform.machine()}")
    # Cores that this process may use: a container or a Slurm job often has fewer than the machine.
    table.add_row("cores, free disk here", f"{len(os.sched_getaffinity(0))}, {free:,.0f} GiB")
    gpus = (
        "none: everything but speed runs on the CPU backend (--device cpu); no FP8, no te backend"
    )
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    table.add_row("GPU", gpus)
    for package in _PACKAGES:
        table.add_row(package, importlib.metadata.version(package))
    for optional in find_optional_packages():
        # Escaped, because rich would read 'mellum2-megatron[te]' as markup and drop the brackets.
        table.add_row(optional.name, escape(f"{optional.state}: {optional.detail}"))
    console.print(table)
