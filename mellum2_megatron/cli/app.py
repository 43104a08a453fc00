"""`mellum2`: the command line. Every command is a thin layer over a library function of the same
name."""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from mellum2_megatron.cli.convert import convert_app
from mellum2_megatron.cli.launch import launch_app
from mellum2_megatron.common.errors import InputError, Mellum2Error

app = typer.Typer(
    help="Train JetBrains' Mellum 2 on NVIDIA Megatron-Core, and convert it to and from Hugging Face.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Make training data.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")
app.add_typer(data_app, name="data")
app.add_typer(launch_app, name="launch")

console = Console()

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="overrides, e.g. layout.ep=8")
]
Nproc = Annotated[int | None, typer.Option("--nproc", min=1, help="ranks on this machine")]
DeviceChoice = Annotated[str, typer.Option("--device", help="auto, cpu or cuda")]
MegatronPath = Annotated[
    Path, typer.Option("--megatron-path", help="checkpoint folder, or one iteration inside it")
]
HfPath = Annotated[Path, typer.Option("--hf-path", help="Hugging Face folder")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier result")]


def main() -> None:
    """Run the command line: exit code 0 on success, 2 for bad input, 1 for a failure at work, 130
    when interrupted."""
    try:
        app(prog_name="mellum2")  # however it was started
    except Mellum2Error as error:
        _fail(str(error), error.exit_code)
    except (
        OSError
    ) as error:  # what the system refused on the way, above all a full disk: its words are clear
        where = f": {error.filename}" if error.filename else ""
        _fail(
            f"{error.strerror or error}{where}. Fix: check that place, its free space and permissions.",
            1,
        )


def _fail(message: str, code: int) -> NoReturn:
    # Plain and unwrapped: paths and values stay in one piece for grep and for copying.
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mellum2-megatron {importlib.metadata.version('mellum2-megatron')}\n")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="print the version and stop", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    pass


def _quiet() -> None:
    """Keep what Megatron warns of, prints and logs on import off the user's terminal."""
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()


@app.command()
def recipes() -> None:
    """List the recipes, one line each."""
    from mellum2_megatron.recipes import describe_recipes

    described = describe_recipes()
    width = max(map(len, described))
    for name, line in described.items():
        console.print(f"[bold]{name:<{width}}[/]  {line}", soft_wrap=True, highlight=False)


@app.command()
def info(
    subject: Annotated[
        str | None, typer.Argument(metavar="RECIPE|PRESET", help="what to describe")
    ] = None,
    overrides: Overrides = None,
    hf_path: Annotated[
        Path | None, typer.Option("--hf-path", help="describe a Hugging Face folder")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="world size for memory per rank")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="tokens a sequence for the FLOPs")
    ] = None,
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="of a recipe: how each weight is updated")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Parameters, active parameters, FLOPs per token and, for a recipe, memory per rank."""
    from mellum2_megatron.cli.info import describe, describe_optimizer

    if optimizer:
        describe_optimizer(
            console,
            subject=subject,
            overrides=overrides or [],
            hf_path=hf_path,
            world_size=nproc,
            as_json=as_json,
        )
        return
    describe(
        console,
        subject=subject,
        overrides=overrides or [],
        hf_path=hf_path,
        world_size=nproc,
        sequence_length=sequence_length,
        as_json=as_json,
    )


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN.yaml", help="recipe name, or a resolved run")
    ],
    overrides: Overrides = None,
    nproc: Nproc = None,
    device: DeviceChoice = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", help="folder of the run; default runs/RECIPE")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved run and stop")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="keep Megatron's own output")] = False,
) -> None:
    """Train on this machine. The same command again resumes from the last checkpoint of its output
    folder."""
    from launchers.start import start_local

    code = start_local(
        recipe,
        overrides or [],
        nproc=nproc,
        device=device,
        output=output,
        dry_run=dry_run,
        verbose=verbose,
    )
    raise typer.Exit(code)


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="check this recipe too")] = None,
    overrides: Overrides = None,
    nproc: Nproc = None,
    device: DeviceChoice = "auto",
) -> None:
    """Say what this machine lacks, and which rules a run breaks."""
    from mellum2_megatron.cli.doctor import examine

    raise typer.Exit(
        0 if examine(console, recipe, overrides or [], nproc=nproc, device=device) else 2
    )


@app.command()
def score(
    tokens: Annotated[Path, typer.Option("--tokens", help="int array [b, s] in a .npy file")],
    out: Annotated[
        Path,
        typer.Option("--out", help=".npz to write: logits and mtp_logits, [b, s, vocab] float32"),
    ],
    megatron_path: Annotated[
        Path | None, typer.Option("--megatron-path", help="Megatron checkpoint")
    ] = None,
    hf_path: Annotated[Path | None, typer.Option("--hf-path", help="Hugging Face folder")] = None,
) -> None:
    """Write the logits of a checkpoint for given tokens."""
    _quiet()
    from conversion.verification.megatron_scoring import score_file

    score_file(tokens, out, megatron_path=megatron_path, hf_path=hf_path)
    console.print(f"wrote {out}", soft_wrap=True)


@app.command()
def generate(
    hf_path: HfPath,
    prompt: Annotated[str, typer.Option("--prompt", help="text to continue")],
    use_mtp: Annotated[bool, typer.Option("--use-mtp", help="draft with the MTP head")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
) -> None:
    """Continue a text greedily with transformers, and report the MTP head's acceptance rate."""
    _quiet()
    from conversion.huggingface.generation import generate as generate_text

    result = generate_text(hf_path, prompt, use_mtp=use_mtp, max_new_tokens=max_new_tokens)
    sys.stdout.write(result.text + "\n")
    if use_mtp:
        sys.stderr.write(result.acceptance_line() + "\n")


@app.command()
def verify(
    megatron_path: MegatronPath,
    hf_path: HfPath,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="int array [b, s] in a .npy file")
    ] = None,
    every_layer: Annotated[
        bool, typer.Option("--layers", help="hidden states layer by layer, not by type")
    ] = False,
) -> None:
    """Compare the logits of a Megatron checkpoint and a Hugging Face folder, main and MTP, and
    their hidden states."""
    _quiet()
    from conversion.verification.megatron_scoring import read_tokens
    from conversion.verification.verify import verify as verify_logits

    report = verify_logits(
        megatron_path, hf_path, read_tokens(tokens) if tokens is not None else None
    )
    console.print(report.table())
    console.print(report.layer_table(every=every_layer))
    raise typer.Exit(0 if report.ok else 1)


@app.command("release")
def make_release(
    megatron_path: MegatronPath,
    output: Annotated[Path, typer.Option("--output", help="folder to write")],
    member: Annotated[
        str, typer.Option("--member", help="base-pretrain, base, instruct-sft, thinking-sft, ...")
    ],
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="JSON table for the model card")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="Jinja file, for chat members")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="take tokenizer files from here")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="evaluation text for the MTP head's acceptance")
    ] = None,
    min_acceptance: Annotated[
        float, typer.Option("--min-acceptance", help="smallest share that passes")
    ] = 0.5,
    skip_run: Annotated[
        bool, typer.Option("--skip-run", help="leave out what loads the model")
    ] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="write the folder unchecked")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Megatron checkpoint to a folder that can be published; it appears only if every check of it
    passes."""
    _quiet()
    from conversion.release.release import release

    result = release(
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
    console.print(str(result), soft_wrap=True, highlight=False)


@app.command("check-release")
def check_release(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Hugging Face folder, made here or elsewhere")
    ],
    member: Annotated[
        str | None, typer.Option("--member", help="base-pretrain, base, instruct-sft, ...")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="evaluation text for the MTP head's acceptance")
    ] = None,
    min_acceptance: Annotated[
        float, typer.Option("--min-acceptance", help="smallest share that passes")
    ] = 0.5,
    skip_run: Annotated[
        bool, typer.Option("--skip-run", help="leave out what loads the model")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Is a Hugging Face folder fit to publish? Exit code 0 when no check fails, else 1."""
    _quiet()
    from conversion.release.check_release import check_release as check

    report = check(
        folder, member=member, text=text, min_acceptance=min_acceptance, skip_run=skip_run
    )
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2) + "\n")
    else:
        console.print(report.table())
    raise typer.Exit(0 if report.ok else 1)


@data_app.command("prepare")
def data_prepare(
    output: Annotated[Path, typer.Option("--output", help="folder to make")],
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--input",
            help="text file, .jsonl or folder (repeatable); default: installed Python sources",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Hugging Face tokenizer folder")
    ] = None,
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", help="entries of a newly trained tokenizer")
    ] = 4096,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="processes; default: one a core")
    ] = None,
    max_megabytes: Annotated[
        float | None,
        typer.Option(
            "--max-megabytes", min=0, help="even sample of so much text; 0 takes everything"
        ),
    ] = None,
    valid_fraction: Annotated[
        float,
        typer.Option("--valid-fraction", help="share of the documents held out for validation"),
    ] = 0.02,
    seed: Annotated[int, typer.Option("--seed", help="of the sample and the split")] = 1234,
    overwrite: Overwrite = False,
) -> None:
    """Text to training-ready tokens: tokenizer, Megatron indexed datasets, corpus.json."""
    _quiet()
    from mellum2_megatron.data.prepare import DEFAULT_MAX_BYTES, prepare

    if max_megabytes is not None and not math.isfinite(max_megabytes):
        raise InputError(
            f"--max-megabytes {max_megabytes}",
            rule="must be finite",
            fix="use 0 to take everything",
        )
    max_bytes = DEFAULT_MAX_BYTES if max_megabytes is None else int(max_megabytes * 1e6) or None
    prepared = prepare(
        output,
        inputs=inputs or (),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        workers=workers,
        max_bytes=max_bytes,
        seed=seed,
        valid_fraction=valid_fraction,
        overwrite=overwrite,
    )
    console.print(
        f"wrote {prepared.path}: {prepared.splits['train'].tokens:,} training tokens",
        soft_wrap=True,
    )


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("--output", help="folder of the run")] = Path(
        "runs/quickstart"
    ),
    data: Annotated[Path, typer.Option("--data", help="folder of the prepared data")] = Path(
        "data/quickstart"
    ),
    overrides: Overrides = None,
    max_megabytes: Annotated[
        float, typer.Option("--max-megabytes", min=0.1, help="size of the corpus")
    ] = 16.0,
) -> None:
    """The whole way on a CPU: corpus, tokens, training on two ranks, export, verification,
    generation."""
    _quiet()
    from launchers.quickstart import run_quickstart

    run_quickstart(
        console, output=output, data=data, overrides=overrides or [], max_megabytes=max_megabytes
    )


if __name__ == "__main__":
    main()
