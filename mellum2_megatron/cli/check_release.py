"""`mellum2 check-release`: checks of a Hugging Face folder before it is published."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.cli.options import AsJson, EvaluationText, MinAcceptance, SkipRun
from mellum2_megatron.common.console import console


def check_release(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Hugging Face folder, made here or elsewhere")
    ],
    member: Annotated[
        str | None,
        typer.Option(
            "--member",
            help="base-pretrain, base, instruct-sft, thinking-sft, instruct or thinking; "
            "default: the one in the folder's verification card",
        ),
    ] = None,
    text: EvaluationText = None,
    min_acceptance: MinAcceptance = 0.5,
    skip_run: SkipRun = False,
    as_json: AsJson = False,
) -> None:
    """Check whether a Hugging Face folder is fit to publish.

    Nothing in the folder is executed.
    Exit code 1 if a check fails.
    """
    from conversion.release.check_release import check_release as check_folder
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    report = check_folder(
        folder, member=member, text=text, min_acceptance=min_acceptance, skip_run=skip_run
    )
    if as_json:
        # Not through rich, which would wrap lines inside JSON strings.
        sys.stdout.write(json.dumps(report.to_dict(), indent=2) + "\n")
    else:
        console.print(report.table())
    raise typer.Exit(0 if report.ok else 1)
