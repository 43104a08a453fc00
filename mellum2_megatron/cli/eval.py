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
        typer.Option("--suite", help="long, miniature, or the name of one measure (repeatable)"),
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
    out: Annotated[
        Path | None,
        typer.Option("--out", help="JSON file of the result; default: eval_SUITE.json in MODEL"),
    ] = None,
) -> None:
    """Measure how good a model is.

    The figures are printed as a table. The JSON file has them with their items, the settings, the
    seeds, and the versions of the software. transformers runs the model, in float32 on the CPU.
    """
    from conversion.huggingface.evaluated_model import TransformersModel
    from conversion.verification.memory import require_huggingface_memory
    from mellum2_megatron.evaluation import evaluate as evaluate_model
    from mellum2_megatron.evaluation import plan
    from mellum2_megatron.evaluation.contamination import (
        check_tokenizer_of,
        find_overlaps,
        open_training_data,
    )
    from mellum2_megatron.evaluation.evaluating import item_texts
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    architecture = _architecture(model)
    planned = plan(architecture, suite, settings or [])
    out = out or model / f"eval_{'_'.join(suite)}.json"
    check_writable("--out", out, folder=False)
    require_huggingface_memory(str(model), architecture, 1)
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
