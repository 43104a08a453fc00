"""`mellum2 quickstart`: every step from text to a verified Hugging Face model, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.cli.options import Overrides


def quickstart(
    output: Annotated[Path, typer.Option("--output", help="folder of the run")] = Path(
        "runs/quickstart"
    ),
    data: Annotated[
        Path, typer.Option("--data", help="folder of the prepared data; made if it is absent")
    ] = Path("data/quickstart"),
    overrides: Overrides = None,
    max_megabytes: Annotated[
        float, typer.Option("--max-megabytes", min=0.1, help="size of the corpus, in MB")
    ] = 16.0,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="go on to a chat model, in OUTPUT_chat: long context, fine-tuning on questions "
            "about code, release; takes the run of an earlier quickstart",
        ),
    ] = False,
) -> None:
    """Go all the way on a CPU, from text to a verified Hugging Face model.

    The steps are corpus, tokens, training on two ranks, export, verification and generation.
    """
    from launchers.quickstart import run_quickstart
    from launchers.quickstart_chat import run_chat_quickstart
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    words = overrides or []
    if chat:
        run_chat_quickstart(base=output, data=data, overrides=words, max_megabytes=max_megabytes)
    else:
        run_quickstart(output=output, data=data, overrides=words, max_megabytes=max_megabytes)
