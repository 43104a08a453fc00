"""`mellum2 eval`: a suite of measures on one model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mellum2_megatron.common.console import console, error_console, plain_table, print_line
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import check_writable
from mellum2_megatron.common.model_folders import kind_of
from mellum2_megatron.common.staging import staging

if TYPE_CHECKING:
    from rich.table import Table

    from mellum2_megatron.architecture import Mellum2Architecture
    from mellum2_megatron.evaluation import Outcome
    from mellum2_megatron.evaluation.harness import HarnessRun


# `eval` is a function of Python.
def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|CHECKPOINT",
            help="Hugging Face folder; or a checkpoint or run folder, which is exported to a "
            "temporary folder first",
        ),
    ],
    suite: Annotated[
        list[str],
        typer.Option(
            "--suite",
            help="long, ruler_like, miniature, or the name of one measure (repeatable); "
            "by lm-evaluation-harness base, instruct, thinking, or a task of --tasks",
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MEASURE.SETTING=VALUE",
            help="settings of the measures, e.g. needle.lengths=512,1024",
        ),
    ] = None,
    training_data: Annotated[
        Path | None,
        typer.Option(
            "--training-data", help="folder of packs; tells which items it holds, by n-grams"
        ),
    ] = None,
    overlap_tokens: Annotated[
        int, typer.Option("--overlap-tokens", help="tokens in a row that make an item known")
    ] = 24,
    tasks: Annotated[
        Path | None,
        typer.Option("--tasks", help="folder of the harness' task files; names become suites"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="harness: first items of each task")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="harness: seed of examples and sampled answers")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="JSON file of the result; default: eval_SUITE.json in MODEL"),
    ] = None,
) -> None:
    """Measure how good a model is.

    The figures are printed as a table. The JSON file has them with their items, the settings, the
    seeds, and the versions of the software. transformers runs the model, in float32 on the CPU.
    """
    from mellum2_megatron.evaluation.harness import HarnessRun
    from mellum2_megatron.evaluation.harness_suites import HARNESS_SUITES
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    if tasks is not None or any(name in HARNESS_SUITES for name in suite):
        if len(suite) != 1 or settings or training_data is not None:
            raise InputError(
                "--suite " + " --suite ".join(suite),
                rule="a suite of lm-evaluation-harness runs alone, and takes no settings",
                fix="run the others by commands of their own",
            )
        _run_harness(model, suite[0], HarnessRun(limit=limit, seed=seed, tasks=tasks), out)
        return
    _run_measures(
        model,
        suite,
        settings or [],
        training_data=training_data,
        overlap_tokens=overlap_tokens,
        out=out,
    )


def _run_measures(
    model: Path,
    suite: list[str],
    settings: list[str],
    *,
    training_data: Path | None,
    overlap_tokens: int,
    out: Path | None,
) -> None:
    """Run suites of our own, write their result and print it."""
    from conversion.huggingface.evaluated_model import TransformersModel
    from conversion.verification.memory import require_long_text_memory
    from mellum2_megatron.evaluation import evaluate as evaluate_model
    from mellum2_megatron.evaluation import plan
    from mellum2_megatron.evaluation.contamination import (
        check_tokenizer_of,
        find_overlaps,
        open_training_data,
    )
    from mellum2_megatron.evaluation.evaluating import item_texts, longest_text

    architecture = _architecture(model)
    planned = plan(architecture, suite, settings)
    out = out or model / f"eval_{'_'.join(suite)}.json"
    check_writable("--out", out, folder=False)
    require_long_text_memory(str(model), architecture, longest_text(architecture, planned))
    data = None
    if training_data is not None:
        data = open_training_data(training_data, overlap_tokens)
    with _hf_folder(model) as hf_path:
        if data is not None:
            check_tokenizer_of(data, hf_path)
        loaded = TransformersModel(hf_path)
        report = evaluate_model(
            loaded,
            planned,
            name=str(model),
            suites=suite,
            announce=lambda name: error_console.print(f"measuring {name}"),
        )
        if data is not None:
            overlaps = find_overlaps(
                loaded.encode, item_texts(planned), data, tokens=overlap_tokens
            )
            report = replace(report, overlaps=tuple(overlaps))
    report.write(out)
    for one, outcome in report.results:
        console.print(_table(one.measure.summary, outcome))
        for note in outcome.notes:
            print_line(note)
    for overlap in report.overlaps or ():
        print_line(overlap.line(training_data or Path(), overlap_tokens))
    print_line(f"wrote {out}")


def _run_harness(model: Path, name: str, run: HarnessRun, out: Path | None) -> None:
    """Run a suite of the harness, write its result and print it."""
    from conversion.verification.memory import require_huggingface_memory
    from mellum2_megatron.evaluation.harness import check_suite, find_suite, run_suite

    suite = find_suite(name, run)
    architecture = _architecture(model)
    out = out or model / f"eval_{name}.json"
    check_writable("--out", out, folder=False)
    check_suite(name, suite, run)
    require_huggingface_memory(str(model), architecture, 1)
    with _hf_folder(model) as folder:
        report = run_suite(
            folder, suite, run, model=model, name=name, out=out, announce=error_console.print
        )
    table = plain_table(
        "benchmark", "metric", "value", "95% interval", "items", "shots", title=name
    )
    for task in report["tasks"]:
        interval = "" if task["low"] is None else f"{task['low']:.3f} to {task['high']:.3f}"
        shots = "" if task["shots"] is None else str(task["shots"])
        value = f"{task['value']:.3f}"
        table.add_row(task["benchmark"], task["metric"], value, interval, str(task["items"]), shots)
    console.print(table)
    for benchmark, reason in report["missing"].items():
        print_line(f"not measured: {benchmark}: {reason}")
    print_line("shots and prompts are the harness' own; the report's are unknown")
    print_line(f"wrote {out}")


def _architecture(path: Path) -> Mellum2Architecture:
    """Return the architecture of a model of either form.

    Raises:
        InputError: there is no complete model, or a checkpoint has no tokenizer.
    """
    from conversion.huggingface.folder import HfFolder
    from mellum2_megatron.checkpoint import find_checkpoint

    if kind_of(path) != "checkpoint":
        with HfFolder.open(path) as folder:
            return folder.architecture
    checkpoint = find_checkpoint(path)
    if checkpoint.tokenizer_dir is None:
        raise InputError(
            str(path),
            rule="the checkpoint has no tokenizer",
            fix="export it with `mellum2 convert export --tokenizer DIR`, and give that folder",
        )
    return checkpoint.architecture


@contextmanager
def _hf_folder(path: Path) -> Iterator[Path]:
    """Yield a model as a Hugging Face folder; that of a checkpoint is removed at the end."""
    from conversion.convert import export_hf

    if kind_of(path) != "checkpoint":
        yield path
        return
    with staging(Path(tempfile.gettempdir()) / "mellum2-eval") as temporary:
        export_hf(path, temporary / "hf")
        yield temporary / "hf"


def _table(title: str, outcome: Outcome) -> Table:
    """Return a measure's figures as a table, a row each."""
    places = list(dict.fromkeys(name for figure in outcome.figures for name in figure.where))
    table = plain_table(*places, "figure", "value", "95% interval", "items", title=title)
    for figure in outcome.figures:
        interval = "" if figure.low is None else f"{figure.low:.3f} .. {figure.high:.3f}"
        table.add_row(
            *(str(figure.where.get(place, "")) for place in places),
            f"{figure.name}, {figure.unit}",
            f"{figure.value:.3f}",
            interval,
            str(figure.items),
        )
    return table
