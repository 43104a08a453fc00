"""`mellum2 data chat`: conversations to packs for supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mellum2_megatron.cli.data import data_app
from mellum2_megatron.cli.options import ChatTemplate, Overwrite
from mellum2_megatron.common.console import print_line

EPOCHS, BATCH = 3, 64
"""Passes over the packs, and sequences a step, of the report's fine-tuning (§5.1)."""


@data_app.command("chat")
def chat(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help=".jsonl (also .gz, .zst) or .parquet files of conversations, or folders of them",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="folder to write")],
    tokenizer: Annotated[
        Path,
        typer.Option(
            "--tokenizer", help="Hugging Face folder, or a run's or data folder with tokenizer/"
        ),
    ],
    mode: Annotated[
        Literal["instruct", "thinking"],
        typer.Option(
            "--mode",
            help="instruct: every turn of the assistant is learnt, reasoning dropped; "
            "thinking: the last turn with its reasoning, up to 5 samples a conversation",
        ),
    ],
    length: Annotated[int, typer.Option("--length", help="tokens of a pack")] = 131_072,
    chat_template: ChatTemplate = None,
    align: Annotated[
        int,
        typer.Option(
            "--align", help="every sample starts at a multiple of it; layout.cp needs 2 * cp"
        ),
    ] = 16,
    valid_fraction: Annotated[
        float,
        typer.Option("--valid-fraction", help="share of the conversations held out; 0: none"),
    ] = 0.02,
    skip_bad_rows: Annotated[
        bool,
        typer.Option("--skip-bad-rows", help="count rows that cannot be used, not refuse them"),
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="processes; default: one per core")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="seed of split and order")] = 1234,
    overwrite: Overwrite = False,
) -> None:
    """Turn conversations into packs with loss masks for supervised fine-tuning.

    Reads the layouts of OpenAI, Hugging Face and ShareGPT; `mellum2 data inspect` shows the result.
    """
    from mellum2_megatron.data.chat.packs import prepare_chat
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    written = prepare_chat(
        output,
        inputs,
        tokenizer=tokenizer,
        mode=mode,
        length=length,
        chat_template=chat_template,
        align=align,
        valid_fraction=valid_fraction,
        seed=seed,
        skip_bad_rows=skip_bad_rows,
        workers=workers,
        overwrite=overwrite,
    )
    folder, counts = written.folder, written.counts
    for line in (*written.files_left_out, *counts.left_out()):
        print_line(line)
    print_line(f"chat template: {folder.facts['chat']['template']['origin']}")
    print_line(
        f"wrote {folder.path}: {counts.conversations:,} conversations, {counts.samples:,} samples, "
        f"{counts.tokens:,} tokens, {counts.learnt:,} of them learnt"
    )
    packs = folder.packs("train")
    print_line(
        f"packs of {length:,} tokens: {packs:,} for training, {folder.packs('valid'):,} for "
        f"validation; {EPOCHS} epochs at {BATCH} sequences a step: "
        f"schedule.train_samples={-(-EPOCHS * packs // BATCH) * BATCH}"
    )


@data_app.command("code-questions")
def code_questions(
    output: Annotated[Path, typer.Option("--output", help=".jsonl file to write")],
    functions: Annotated[
        int, typer.Option("--functions", help="most functions, a conversation each")
    ] = 2000,
    seed: Annotated[int, typer.Option("--seed", help="seed that draws them")] = 1234,
) -> None:
    """Make conversations about short functions of Python's standard library.

    The answers are in the code, so that they can be checked: name, arguments, docstring.
    """
    from mellum2_megatron.data.chat.code_questions import write_code_questions

    count = write_code_questions(output, functions=functions, seed=seed)
    print_line(f"wrote {output}: {count:,} conversations (Python's standard library, PSF-2.0)")
