"""Options and start of the ranks that score a checkpoint: `mellum2 score` and `mellum2 verify`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Backend, Device

if TYPE_CHECKING:
    from conversion.verification.ranks import Ranks

TP = Annotated[int, typer.Option("--tp", help="tensor-parallel ranks of the Megatron model")]
PP = Annotated[int, typer.Option("--pp", help="its pipeline stages")]
EP = Annotated[int, typer.Option("--ep", help="ranks that divide the experts of a layer")]
ETP = Annotated[int, typer.Option("--etp", help="ranks that divide each expert")]
CP = Annotated[int, typer.Option("--cp", help="ranks that divide each sequence")]
NprocOfLayout = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="ranks to start here; default: as few as the layout needs"),
]
BackendChoice = Annotated[
    str,
    typer.Option(
        "--backend",
        help="te (Transformer Engine), torch, or auto: te on a GPU where it supports the case",
    ),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        "--work-dir",
        help="folder for temporary files, seen by all ranks; default: the system's own",
    ),
]


def ranks_of(
    *,
    tp: int,
    pp: int,
    ep: int,
    etp: int,
    cp: int,
    nproc: int | None,
    device: str,
    backend: str,
    dtype: str = "float32",
) -> Ranks:
    """Return the ranks of a command line.

    Where torchrun or srun has started several processes their number is that of the environment.

    Raises:
        InputError: a value out of range, or an unknown word.
    """
    from conversion.huggingface.format import torch_dtype
    from conversion.verification.ranks import Ranks
    from conversion.verification.scoring import environment_rank
    from mellum2_megatron.cli.options import as_options
    from mellum2_megatron.config import Layout
    from mellum2_megatron.planning.resolve import resolve_device

    choices = ("auto", *get_args(Backend))
    if backend not in choices:
        raise InputError(
            f"--backend {backend}", rule=f"there are {', '.join(choices)}", fix="use one of them"
        )
    torch_dtype(dtype)
    if nproc is None and environment_rank() is not None:
        nproc = int(os.environ["WORLD_SIZE"])
    with as_options():
        # Sequence parallelism is no choice here: Layout requires it with tp > 1.
        layout = Layout(tp=tp, sp=tp > 1, pp=pp, ep=ep, etp=etp, cp=cp)
    return Ranks(
        layout=layout,
        nproc=nproc,
        device=resolve_device(device),
        backend=None if backend == "auto" else cast(Backend, backend),
        dtype=dtype,
    )


def start_ranks(command: Sequence[str], *, nproc: int, device: Device) -> None:
    """Run a command once per rank on this machine (`conversion.verification.RankStarter`).

    Raises:
        InputError, WorkError: the ranks failed; one message for all.
        typer.Exit: an interrupt ended them.
    """
    from launchers.local import rank_environment, run_ranks, temporary_environment
    from mellum2_megatron.faults.failures import root_cause

    with temporary_environment(rank_environment(nproc, device)):
        outcome = run_ranks(list(command), nproc=nproc)
    if isinstance(outcome, int):
        if outcome:
            raise typer.Exit(outcome)
        return
    cause = root_cause(outcome)
    if cause.kind == "explained":
        raise cause.error(None, None)
    if cause.exit_code < 0:
        raise WorkError(
            f"rank {cause.rank} was ended by signal {-cause.exit_code}",
            fix="if nobody sent it, the machine ran out of memory (see dmesg): use more ranks on "
            "more memory, or shorter sequences",
        )
    last = "\n".join((cause.message or cause.traceback).strip().splitlines()[-12:])
    raise WorkError(
        f"rank {cause.rank} failed with exit code {cause.exit_code}: {last or 'no message'}",
        fix="start again with fewer parallelisms at once to find the one that fails",
    )
