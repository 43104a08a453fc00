"""`mellum2 data prepare`: text to training-ready tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.cli.options import Overwrite
from mellum2_megatron.common.console import print_line
from mellum2_megatron.common.errors import InputError

data_app = typer.Typer(help="Make training data.", no_args_is_help=True)


@data_app.command("prepare")
def prepare(
    output: Annotated[Path, typer.Option("--output", help="folder to write")],
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--input",
            help="text file, .jsonl file or folder (repeatable); "
            "default: the Python sources installed on this machine",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", help="Hugging Face tokenizer folder; default: train a new tokenizer"
        ),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", help="entries of a newly trained tokenizer")
    ] = 4096,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="processes; default: one per core")
    ] = None,
    max_megabytes: Annotated[
        float | None,
        typer.Option(
            "--max-megabytes",
            min=0,
            help="size of an even sample of the text; 0: all of it; default: 32 MiB",
        ),
    ] = None,
    valid_fraction: Annotated[
        float,
        typer.Option("--valid-fraction", help="share of the documents held out for validation"),
    ] = 0.02,
    seed: Annotated[int, typer.Option("--seed", help="seed of the sample and the split")] = 1234,
    overwrite: Overwrite = False,
) -> None:
    """Turn text into training-ready tokens.

    Writes a tokenizer, Megatron indexed datasets and corpus.json.
    """
    from mellum2_megatron.data.prepare import DEFAULT_MAX_BYTES
    from mellum2_megatron.data.prepare import prepare as prepare_data
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    # `prepare` takes bytes, and None for no limit. min=0 lets NaN and infinity through.
    if max_megabytes is None:
        max_bytes: int | None = DEFAULT_MAX_BYTES
    elif math.isfinite(max_megabytes):
        max_bytes = int(max_megabytes * 1e6) or None
    else:
        raise InputError(
            f"--max-megabytes {max_megabytes}",
            rule="must be finite",
            fix="use 0 to take everything",
        )
    prepared = prepare_data(
        output,
        inputs=inputs or (),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        workers=workers,
        max_bytes=max_bytes,
        seed=seed,
        valid_fraction=valid_fraction,
        overwrite=overwrite,
    )
    print_line(f"wrote {prepared.path}: {prepared.splits['train'].tokens:,} training tokens")
