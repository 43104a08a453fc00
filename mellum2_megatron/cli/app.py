"""The command line `mellum2`: its commands in panels, and its exit codes."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from mellum2_megatron.cli.check_release import check_release
from mellum2_megatron.cli.convert import convert_app
from mellum2_megatron.cli.data import data_app
from mellum2_megatron.cli.doctor import doctor
from mellum2_megatron.cli.generate import generate
from mellum2_megatron.cli.info import info
from mellum2_megatron.cli.launch import launch_app
from mellum2_megatron.cli.quickstart import quickstart
from mellum2_megatron.cli.recipes import recipes
from mellum2_megatron.cli.release import release
from mellum2_megatron.cli.score import score
from mellum2_megatron.cli.train import train
from mellum2_megatron.cli.verify import verify
from mellum2_megatron.common.errors import Mellum2Error

app = typer.Typer(
    help="Train JetBrains' Mellum 2 on NVIDIA Megatron-Core; convert it to and from Hugging Face.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Start and plan": (quickstart, recipes, info, doctor),
    "Train": (train,),
    "Convert and compare": (verify, score, generate),
    "Publish": (release, check_release),
}
"""Panel of `mellum2 --help` -> its commands. A command has the name of its function."""

for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(data_app, name="data", rich_help_panel="Train")
app.add_typer(launch_app, name="launch", rich_help_panel="Train")
app.add_typer(convert_app, name="convert", rich_help_panel="Convert and compare")


def main() -> None:
    """Run the command line and end the process.

    Exit codes: 0 on success, 2 for bad input, 1 for a failure at work, 130 when interrupted.
    """
    try:
        # The help must show `mellum2`, also when called as `python -m mellum2_megatron`.
        app(prog_name="mellum2")
    except Mellum2Error as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        # An error of the operating system that no library expected, most often a full disk. Its
        # message is clear, and a traceback would bury it.
        where = f": {error.filename}" if error.filename else ""
        _fail(
            f"{error.strerror or error}{where}. "
            "Fix: check that place, its free space and permissions.",
            1,
        )


def _fail(message: str, code: int) -> NoReturn:
    # Not through rich, which would break a path over two lines.
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mellum2-megatron {importlib.metadata.version('mellum2-megatron')}\n")
        raise typer.Exit


# An empty function: typer makes its parameters the options of `mellum2` itself.
@app.callback()
def _options_of_mellum2(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="print the version and exit", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    pass
