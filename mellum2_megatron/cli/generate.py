"""`mellum2 generate`: text from a Hugging Face folder."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mellum2_megatron.cli.options import HfPath


def generate(
    hf_path: HfPath,
    prompt: Annotated[str, typer.Option("--prompt", help="text to continue")],
    use_mtp: Annotated[
        bool, typer.Option("--use-mtp", help="draft with the MTP head and report its acceptance")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="most tokens to generate")
    ] = 64,
) -> None:
    """Continue a text greedily with transformers.

    The text is the same with and without --use-mtp.
    """
    from conversion.huggingface.generation import generate as generate_text
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    result = generate_text(hf_path, prompt, use_mtp=use_mtp, max_new_tokens=max_new_tokens)
    # Standard output has the text alone, so that it can be piped.
    sys.stdout.write(result.text + "\n")
    if use_mtp:
        sys.stderr.write(result.acceptance_line() + "\n")
