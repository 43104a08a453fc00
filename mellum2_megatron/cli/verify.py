"""`mellum2 verify`: a Megatron checkpoint against a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.cli.options import HfPath, MegatronPath
from mellum2_megatron.common.console import console


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
) -> None:
    """Compare logits and hidden states of a checkpoint and a Hugging Face folder.

    Both models run in float32 on the same tokens, the MTP head included.
    Exit code 1 if their logits differ.
    """
    from conversion.verification.megatron_scoring import read_tokens
    from conversion.verification.verify import verify as verify_logits
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    # None: `verify` draws random tokens, the same ones on every call.
    ids = read_tokens(tokens) if tokens is not None else None
    report = verify_logits(megatron_path, hf_path, ids)
    console.print(report.table())
    console.print(report.layer_table(every=every_layer))
    raise typer.Exit(0 if report.ok else 1)
