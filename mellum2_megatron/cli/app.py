"""The command line `mellum2`: its commands in panels, and its exit codes."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer

from mellum2_megatron.cli import chat, corpus_plan, rl_nemo  # noqa: F401  # add commands
from mellum2_megatron.cli.ablate import ablate_app
from mellum2_megatron.cli.bench_inference import bench_inference
from mellum2_megatron.cli.check_release import check_release
from mellum2_megatron.cli.convert import convert_app
from mellum2_megatron.cli.data import data_app
from mellum2_megatron.cli.doctor import doctor
from mellum2_megatron.cli.eval import evaluate
from mellum2_megatron.cli.generate import generate
from mellum2_megatron.cli.gpu_check import gpu_check
from mellum2_megatron.cli.help_page import mend_help
from mellum2_megatron.cli.index import index
from mellum2_megatron.cli.info import info
from mellum2_megatron.cli.keys import keys
from mellum2_megatron.cli.launch import launch_app
from mellum2_megatron.cli.packs import inspect, verify_command, where
from mellum2_megatron.cli.plot import plot
from mellum2_megatron.cli.quickstart import quickstart
from mellum2_megatron.cli.recipes import recipes
from mellum2_megatron.cli.release import release
from mellum2_megatron.cli.rl import rl_app
from mellum2_megatron.cli.runs import runs
from mellum2_megatron.cli.score import score
from mellum2_megatron.cli.search import search
from mellum2_megatron.cli.serve import serve
from mellum2_megatron.cli.train import train
from mellum2_megatron.cli.verify import verify
from mellum2_megatron.common.errors import InputError, Mellum2Error, shown
from mellum2_megatron.common.secret_names import mask_secrets

# The class of all faults of a command line; typer exports this child of it alone.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Train JetBrains' Mellum 2 on NVIDIA Megatron-Core; convert it to and from Hugging Face.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Start and plan": (quickstart, recipes, keys, info, doctor, gpu_check, search),
    "Train": (train, runs, plot),
    "Convert and compare": (verify, score, generate, bench_inference, serve),
    "Publish": (release, check_release),
}
"""Panel of `mellum2 --help` -> its commands. A command has the name of its function."""

for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.command("eval", rich_help_panel="Convert and compare")(evaluate)
data_app.command("inspect")(inspect)
data_app.command("where")(where)
data_app.command("verify")(verify_command)
data_app.command("index")(index)
app.add_typer(data_app, name="data", rich_help_panel="Train")
app.add_typer(launch_app, name="launch", rich_help_panel="Train")
app.add_typer(rl_app, name="rl", rich_help_panel="Train")
app.add_typer(ablate_app, name="ablate", rich_help_panel="Train")
app.add_typer(convert_app, name="convert", rich_help_panel="Convert and compare")


def main() -> NoReturn:
    """Run the command line and end the process.

    Exit codes: 0 on success, 2 for bad input, 1 for a failure at work, 130 when interrupted.
    """
    try:
        _refuse_empty_words(sys.argv[1:])
        # The help must show `mellum2`, also when called as `python -m mellum2_megatron`.
        code = command_line().main(prog_name="mellum2", standalone_mode=False)
    except Mellum2Error as error:
        _fail(str(error), error.exit_code)
    except _USAGE_ERROR as error:
        # Its help is printed already.
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(2)
        _fail(str(usage_fault(error, sys.argv[1:])), 2)
    except typer.Abort:
        _fail("aborted", 1)
    except MemoryError:
        _fail("the memory of this machine is full. Fix: give smaller inputs, or more memory.", 1)
    except OSError as error:
        # An error of the operating system that no library expected, most often a full disk. Its
        # message is clear, and a traceback would bury it.
        where = f": {error.filename}" if error.filename else ""
        _fail(
            f"{error.strerror or error}{where}. "
            "Fix: check that place, its free space and permissions.",
            1,
        )
    sys.exit(code if isinstance(code, int) else 0)


def usage_fault(error: Any, words: Sequence[str]) -> InputError:
    """Return a fault of the command line that typer found, in the form of all our refusals.

    Args:
        error: typer's error, of class UsageError.
        words: the command line.
    """
    command = error.ctx.command_path if error.ctx else "mellum2"
    message, _, guess = error.format_message().partition(" Did you mean ")
    fix = f"did you mean {guess.rstrip('?')}" if guess else f"see `{command} -h`"
    parameter = getattr(error, "param", None)
    if parameter is None or not error.message:  # not about a value
        return InputError(command, rule=_as_rule(message), fix=fix)
    value = parameter.metavar or parameter.opts[0]
    if parameter.opts[0].startswith("-"):
        value = f"{parameter.opts[0]} {shown(_given_for(parameter.opts, words), quote=False)}"
    return InputError(value, rule=_as_rule(error.message), fix=fix)


def _as_rule(message: str) -> str:
    message = message.removeprefix("Value error, ").strip().rstrip(".")
    message = message.replace("Input should be", "it must be")
    return message[:1].lower() + message[1:]


def _given_for(options: Sequence[str], words: Sequence[str]) -> str:
    """Return the value of an option on a command line; empty if it is not there."""
    for word, after in itertools.pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name in options:
            return value if equals else after
    return ""


def _refuse_empty_words(words: Sequence[str]) -> None:
    """Refuse ``--output ""``, which a shell makes of a variable that is not set.

    As a path it would be the current folder.
    """
    for before, word in itertools.pairwise(["", *words]):
        option = before if word == "" else word.removesuffix("=")
        if option.startswith("--") and option not in ("--prompt", word):
            raise InputError(
                f'{option} ""',
                rule="is empty, like a shell variable that is not set",
                fix="give a value, or leave the option out",
            )


def command_line() -> Any:
    """Return the command of `mellum2`, with its help pages mended."""
    command = typer.main.get_command(app)
    mend_help(command)
    return command


def _fail(message: str, code: int) -> NoReturn:
    # Not through rich, which would break a path over two lines.
    sys.stderr.write(f"error: {mask_secrets(message)}\n")
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
