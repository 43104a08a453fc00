"""`mellum2 release`: from a Megatron checkpoint to a folder that can be published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.cli.options import (
    EvaluationText,
    MegatronPath,
    MinAcceptance,
    Overwrite,
    SkipRun,
    TokenizerPath,
)
from mellum2_megatron.common.console import console, print_line


def release(
    megatron_path: MegatronPath,
    output: Annotated[Path, typer.Option("--output", help="folder to write")],
    member: Annotated[
        str,
        typer.Option(
            "--member",
            help="base-pretrain, base, instruct-sft, thinking-sft, instruct or thinking",
        ),
    ],
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="JSON table of scores for the model card")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            "--chat-template",
            help="Jinja file, for chat members; default: the one beside the tokenizer",
        ),
    ] = None,
    tokenizer: TokenizerPath = None,
    text: EvaluationText = None,
    min_acceptance: MinAcceptance = 0.5,
    skip_run: SkipRun = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="write the folder unchecked")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Make a folder that can be published from a Megatron checkpoint.

    Adds tokenizer, licence, model card and verification card to the weights.
    The folder appears only if it passes every check.
    """
    from conversion.release.release import release as make_release
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    result = make_release(
        megatron_path,
        output,
        member=member,
        evaluation=evaluation,
        chat_template=chat_template,
        tokenizer=tokenizer,
        text=text,
        min_acceptance=min_acceptance,
        overwrite=overwrite,
        check=not no_check,
        skip_run=skip_run,
    )
    if result.report is not None:
        console.print(result.report.table())
    print_line(str(result))
