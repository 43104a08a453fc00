"""`mellum2 generate`: text from a Hugging Face folder or a Megatron checkpoint."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.staging import staging


def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="text to continue")],
    hf_path: Annotated[
        Path | None,
        typer.Option("--hf-path", help="Hugging Face folder; give this or --megatron-path"),
    ] = None,
    megatron_path: Annotated[
        Path | None,
        typer.Option(
            "--megatron-path", help="checkpoint or run folder, exported to a temporary folder first"
        ),
    ] = None,
    use_mtp: Annotated[
        bool, typer.Option("--use-mtp", help="draft with the MTP head and report its acceptance")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="most tokens to generate")
    ] = 64,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", help="0: the likeliest token each time; 0.01 to 100: sampled"
        ),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**63 - 1, help="seed of sampled text")
    ] = 0,
) -> None:
    """Continue a text with transformers.

    At temperature 0 the text is the same with and without --use-mtp.
    """
    from conversion.convert import export_hf
    from conversion.huggingface.generation import generate as generate_text
    from mellum2_megatron.checkpoint import find_checkpoint
    from mellum2_megatron.upstream import quiet_upstream

    # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"--prompt {prompt!r}", rule="it must be text in UTF-8", fix="convert it"
        ) from None
    quiet_upstream()
    if (hf_path is None) == (megatron_path is None):
        raise InputError(
            "generate",
            rule="exactly one model writes the text",
            fix="give either --hf-path or --megatron-path",
        )
    if megatron_path is not None:
        checkpoint = find_checkpoint(megatron_path)
        # Checked here: the checks of the export would name its temporary folder.
        if checkpoint.tokenizer_dir is None:
            raise InputError(
                f"--megatron-path {megatron_path}",
                rule="it has no tokenizer",
                fix="export it with `mellum2 convert export --tokenizer DIR`, and give --hf-path",
            )
        if use_mtp and not checkpoint.architecture.num_mtp_layers:
            raise InputError(
                f"--use-mtp with {megatron_path}",
                rule="the model has no MTP head",
                fix="leave --use-mtp out",
            )
    with staging(Path(tempfile.gettempdir()) / "mellum2-generate") as temporary:
        if megatron_path is not None:
            hf_path = temporary / "hf"
            export_hf(megatron_path, hf_path)
            # To standard error: standard output has the text alone, so that it can be piped.
            sys.stderr.write(
                f"exported {megatron_path} to a temporary folder; "
                "`mellum2 convert export` keeps one\n"
            )
        assert hf_path is not None
        result = generate_text(
            hf_path,
            prompt,
            use_mtp=use_mtp,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
    sys.stdout.write(result.text + "\n")
    if use_mtp:
        sys.stderr.write(result.acceptance_line() + "\n")
