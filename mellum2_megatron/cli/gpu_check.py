"""`mellum2 gpu-check`: does this machine train Mellum 2 exactly, and how fast?"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.cli.options import DeviceChoice
from mellum2_megatron.common.console import print_line
from mellum2_megatron.common.errors import InputError


def gpu_check(
    output: Annotated[
        Path, typer.Option("--output", help="folder of the results, by machine and code")
    ] = Path("runs/gpu_check"),
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PIECE", help="run this piece again (repeatable)"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            min=1,
            help="start no piece that may end later; the same command continues; default: no limit",
        ),
    ] = None,
    device: DeviceChoice = "auto",
) -> None:
    """Check a GPU machine, piece by piece, and write one page.

    Packages and kernels, te against torch, FP8 against BF16, layouts, checkpoints, speed, memory.
    A piece that has passed on this machine with this code is not run again.
    With --device cpu a tiny model rehearses the whole check.
    Exit code 1 if a piece failed, 75 if --minutes left some for the next call.
    """
    from mellum2_megatron.common.files import check_writable
    from mellum2_megatron.faults.stop_request import STOPPED
    from mellum2_megatron.gpu_check.machine import facts, rehearsal_facts
    from mellum2_megatron.gpu_check.page import NOT_RUN, PAGE
    from mellum2_megatron.gpu_check.running import check_minutes, check_names, run_pieces
    from mellum2_megatron.planning.resolve import resolve_device

    names = only or []
    check_names(names)
    check_minutes(minutes, names)
    check_writable("--output", output, folder=True)
    rehearsal = device == "cpu"
    if not rehearsal and resolve_device(device) == "cpu":
        raise InputError(
            f"--device {device}",
            rule="no GPU is usable here",
            fix="run it on a machine with one, or rehearse it with --device cpu",
        )
    # Without this the signal would leave the running command behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    machine = rehearsal_facts() if rehearsal else facts()
    folder, results = run_pieces(
        output, machine, rehearsal=rehearsal, only=names, minutes=minutes, report=print_line
    )
    for line in results["decides"]:
        print_line(line)
    print_line(f"page: {folder / PAGE}")
    if results["counts"]["failed"]:
        raise typer.Exit(1)
    if results["counts"][NOT_RUN] and not names:
        print_line("not all pieces have run: the same command continues")
        raise typer.Exit(STOPPED)
