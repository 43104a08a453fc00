"""`mellum2 verify`: a Megatron checkpoint against a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.cli.options import DeviceChoice, HfPath, MegatronPath, as_options, check_forms
from mellum2_megatron.cli.ranks import (
    CP,
    EP,
    ETP,
    PP,
    TP,
    BackendChoice,
    NprocOfLayout,
    WorkDir,
    ranks_of,
    start_ranks,
)
from mellum2_megatron.common.console import console, print_line


def verify(
    megatron_path: MegatronPath,
    hf_path: HfPath,
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens", help=".npy file of token ids, batch x sequence; default: random tokens"
        ),
    ] = None,
    every_layer: Annotated[
        bool, typer.Option("--layers", help="list hidden states by layer, not by layer type")
    ] = False,
    tp: TP = 1,
    pp: PP = 1,
    ep: EP = 1,
    etp: ETP = 1,
    cp: CP = 1,
    nproc: NprocOfLayout = None,
    device: DeviceChoice = "auto",
    backend: BackendChoice = "auto",
    work_dir: WorkDir = None,
) -> None:
    """Compare logits and hidden states of a checkpoint and a Hugging Face folder.

    Both models run in float32 on the same tokens, the MTP head included.
    transformers runs in one process, 4 bytes a parameter; the Megatron model may be divided.
    Exit code 1 if their logits differ.
    """
    from conversion.verification.scoring import environment_rank, read_tokens
    from conversion.verification.verify import assist
    from conversion.verification.verify import verify as verify_logits
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    check_forms(megatron_path, hf_path)
    ranks = ranks_of(
        tp=tp, pp=pp, ep=ep, etp=etp, cp=cp, nproc=nproc, device=device, backend=backend
    )
    # None: `verify` draws random tokens, the same ones on every call.
    ids = read_tokens(tokens) if tokens is not None else None
    with as_options():
        if environment_rank():
            assist(megatron_path, ids, ranks, work_dir)
            return
        report = verify_logits(
            megatron_path, hf_path, ids, ranks=ranks, start=start_ranks, work_dir=work_dir
        )
    console.print(report.table())
    console.print(report.layer_table(every=every_layer))
    for line in report.unseen:
        print_line(f"warning: {line}")
    raise typer.Exit(0 if report.ok else 1)
