"""`mellum2 score`: logits of a Megatron checkpoint or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.cli.options import DeviceChoice, as_options, check_forms
from mellum2_megatron.cli.ranks import (
    CP,
    EP,
    ETP,
    PP,
    TP,
    BackendChoice,
    NprocOfLayout,
    ranks_of,
    start_ranks,
)
from mellum2_megatron.common.console import print_line


def score(
    tokens: Annotated[
        Path, typer.Option("--tokens", help=".npy file of token ids, batch x sequence")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help=".npz file to write: float32 logits and, with an MTP head, mtp_logits, "
            "each [b, s, vocabulary]",
        ),
    ],
    megatron_path: Annotated[
        Path | None,
        typer.Option("--megatron-path", help="Megatron checkpoint; give this or --hf-path"),
    ] = None,
    hf_path: Annotated[Path | None, typer.Option("--hf-path", help="Hugging Face folder")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="score only so many sequences")
    ] = None,
    tp: TP = 1,
    pp: PP = 1,
    ep: EP = 1,
    etp: ETP = 1,
    cp: CP = 1,
    nproc: NprocOfLayout = None,
    device: DeviceChoice = "auto",
    backend: BackendChoice = "auto",
    dtype: Annotated[
        str, typer.Option("--torch-dtype", help="dtype of a Megatron model's arithmetic")
    ] = "float32",
) -> None:
    """Write the logits of one checkpoint for given tokens.

    A Megatron checkpoint may be divided among ranks: --tp, --pp, --ep, --etp, --cp.
    They are started here, unless torchrun or srun has started this command on each.
    """
    from conversion.verification.scoring import environment_rank, score_file
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    check_forms(megatron_path, hf_path)
    ranks = ranks_of(
        tp=tp,
        pp=pp,
        ep=ep,
        etp=etp,
        cp=cp,
        nproc=nproc,
        device=device,
        backend=backend,
        dtype=dtype,
    )
    with as_options():
        # Both paths are optional for typer: `score_file` refuses none and both with one message.
        score_file(
            tokens,
            out,
            megatron_path=megatron_path,
            hf_path=hf_path,
            limit=limit,
            ranks=ranks,
            start=start_ranks,
        )
    if not environment_rank():
        print_line(f"wrote {out}")
