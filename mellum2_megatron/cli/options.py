"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# No square brackets in help texts: rich reads "[b, s]" as markup and drops it. In a command's
# docstring, one sentence a line below the first: typer keeps the line breaks.

RecipeOrRun = Annotated[
    str, typer.Argument(metavar="RECIPE|RUN.yaml", help="recipe name or resolved run file")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="overrides, e.g. layout.ep=8")
]
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
MegatronPath = Annotated[
    Path, typer.Option("--megatron-path", help="checkpoint folder, or one iteration inside it")
]
HfPath = Annotated[Path, typer.Option("--hf-path", help="Hugging Face folder")]
TokenizerPath = Annotated[
    Path | None, typer.Option("--tokenizer", help="folder to take the tokenizer files from")
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
