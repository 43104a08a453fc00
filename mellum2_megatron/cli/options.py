"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.cli.complete import complete_override, complete_recipe
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.model_folders import kind_of

# In a command's docstring, one sentence a line below the first: typer keeps the line breaks.

RecipeOrRun = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|FILE.py:RECIPE|RUN.yaml",
        help="recipe, recipe in a Python file, or resolved run file",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="overrides, e.g. layout.ep=8; `mellum2 keys` explains them",
        autocompletion=complete_override,
    ),
]
RunOutput = Annotated[
    Path | None, typer.Option("--output", help="folder of the run; default: runs/RECIPE")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="print the resolved run and Megatron's arguments, and stop"),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="show Megatron's own output")]
Nproc = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        help="ranks on this machine; default: one per GPU; on a CPU as few as the layout needs",
    ),
]
DeviceChoice = Annotated[
    str, typer.Option("--device", help="auto (a GPU if there is one), cpu or cuda")
]
Card = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help="card of each rank, whose memory the run must fit: h100, h200, b200, a100-80, a100-40 "
        "or l40s",
    ),
]
MegatronPath = Annotated[
    Path, typer.Option("--megatron-path", help="checkpoint folder, or one iteration inside it")
]
HfPath = Annotated[Path, typer.Option("--hf-path", help="Hugging Face folder")]
TokenizerPath = Annotated[
    Path | None, typer.Option("--tokenizer", help="folder to take the tokenizer files from")
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        help="Jinja file, or mellum for this project's own; "
        "default: the tokenizer's, else this project's own",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier result")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]

EvaluationText = Annotated[
    Path | None,
    typer.Option("--text", help="text file on which the MTP head's acceptance is measured"),
]
MinAcceptance = Annotated[
    float,
    typer.Option("--min-acceptance", help="smallest MTP acceptance on --text that passes, 0 to 1"),
]
SkipRun = Annotated[
    bool, typer.Option("--skip-run", help="leave out the checks that load the model")
]


@contextmanager
def as_options() -> Iterator[None]:
    """Name a layout's keys in errors as the options of the command: `layout.ep=3` as `--ep 3`."""
    try:
        yield
    except InputError as error:
        value, rule, fix = (
            re.sub(r"layout\.(\w+)=", r"--\1 ", text)
            for text in (error.value, error.rule, error.fix)
        )
        raise InputError(value, rule=rule, fix=fix) from error


def check_forms(megatron_path: Path | None, hf_path: Path | None) -> None:
    """Refuse two folders under each other's option, and one alone under the other's.

    Raises:
        InputError: they are.
    """
    megatron_is_hf = megatron_path is not None and kind_of(megatron_path) == "huggingface"
    hf_is_megatron = hf_path is not None and kind_of(hf_path) == "checkpoint"
    if megatron_is_hf and (hf_path is None or hf_is_megatron):
        raise InputError(
            f"--megatron-path {megatron_path}",
            rule="this is a Hugging Face folder",
            fix=f"give --hf-path {megatron_path}"
            + (f" and --megatron-path {hf_path}" if hf_path is not None else ""),
        )
    if hf_is_megatron and megatron_path is None:
        raise InputError(
            f"--hf-path {hf_path}",
            rule="this is a Megatron checkpoint",
            fix=f"give --megatron-path {hf_path}",
        )
