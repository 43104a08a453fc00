"""`mellum2 doctor`: what this machine has, what its gaps cost, and what a run would trip over."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.planning.optional_packages import find_extras
from mellum2_megatron.planning.resolve import plan, resolve_run
from mellum2_megatron.planning.rules import check

_PACKAGES = ("torch", "megatron-core", "emerging-optimizers", "transformers")


def examine(
    console: Console,
    recipe: str | None,
    overrides: Sequence[str],
    *,
    nproc: int | None,
    device: str,
) -> bool:
    """Print the state of the machine, and every rule that a run breaks.

    Args:
        console: where the tables go.
        recipe: recipe or resolved run to check, or None for the machine alone.
        overrides: `key=value` words for it.
        nproc, device: as for `train`.

    Returns:
        Whether nothing is broken.
    """
    _machine(console)
    if recipe is None:
        return True
    try:
        run = resolve_run(recipe, overrides)
    except InputError as error:
        console.print(f"[red]refused[/]  {error}", soft_wrap=True, highlight=False)
        return False
    where, ranks = plan(run, device, nproc)
    violations = check(run, ranks, where)
    table = Table(
        title=f"{run.name} on {ranks} {where} rank(s)",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for column in ("rule", "what is wrong", "fix", "evidence"):
        table.add_column(column, overflow="fold")
    for violation in violations:
        table.add_row(
            violation.name,
            f"{violation.value}: {violation.rule}",
            violation.fix,
            violation.evidence,
        )
    if violations:
        console.print(table)
    else:
        console.print(f"{run.name} on {ranks} {where} rank(s): breaks no rule", highlight=False)
    return not violations


def _machine(console: Console) -> None:
    table = Table(
        title="This machine",
        title_justify="left",
        box=None,
        show_header=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    table.add_row("python", f"{platform.python_version()} on {platform.machine()}")
    table.add_row("cores, free disk here", f"{len(os.sched_getaffinity(0))}, {free:,.0f} GiB")
    table.add_row("GPU", _gpus())
    for package in _PACKAGES:
        table.add_row(package, importlib.metadata.version(package))
    for extra in find_extras():
        table.add_row(extra.name, escape(f"{extra.state}: {extra.detail}"))
    console.print(table)


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: everything but speed runs on the CPU backend (--device cpu); no FP8, no te backend"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
