"""`mellum2 score`: logits of a Megatron checkpoint or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
            "batch x sequence x vocabulary",
        ),
    ],
    megatron_path: Annotated[
        Path | None,
        typer.Option("--megatron-path", help="Megatron checkpoint; give this or --hf-path"),
    ] = None,
    hf_path: Annotated[Path | None, typer.Option("--hf-path", help="Hugging Face folder")] = None,
) -> None:
    """Write the logits of one checkpoint for given tokens."""
    from conversion.verification.megatron_scoring import score_file
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    # Both options are optional for typer: `score_file` refuses none and both with one message.
    score_file(tokens, out, megatron_path=megatron_path, hf_path=hf_path)
    print_line(f"wrote {out}")
