"""`mellum2 info`: figures of a recipe, a preset or a model's folder."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mellum2_megatron.cli.complete import complete_subject
from mellum2_megatron.cli.options import AsJson, Card, Overrides
from mellum2_megatron.common.console import console, print_line
from mellum2_megatron.common.errors import InputError, nearest

if TYPE_CHECKING:
    from mellum2_megatron.architecture import Mellum2Architecture
    from mellum2_megatron.config import Run


def info(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|FILE.py:RECIPE|RUN.yaml|PRESET|FOLDER",
            help="recipe, run file, architecture preset, or folder of a model",
            autocompletion=complete_subject,
        ),
    ] = None,
    overrides: Overrides = None,
    hf_path: Annotated[
        Path | None, typer.Option("--hf-path", help="describe this Hugging Face folder instead")
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="number of ranks; default: the recipe's own"),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            help="tokens a sequence, for the FLOPs; default: the recipe's, or the model's longest"
        ),
    ] = None,
    gpu: Card = None,
    optimizer: Annotated[
        bool,
        typer.Option("--optimizer", help="show how each weight of a recipe's model is updated"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print parameters, FLOPs per token and, for a recipe, memory per rank.

    With --gpu, exit code 2 if a rank needs more memory than the card has; and for h100 and h200 the
    estimated time of a step.
    """
    # Separate functions: the optimizer's report needs a run, the other one only a model.
    if optimizer:
        if gpu is not None:
            raise InputError(
                f"--gpu {gpu} with --optimizer",
                rule="the optimizer's report has no memory",
                fix="drop one of the two",
            )
        describe_optimizer(
            subject, overrides or [], hf_path=hf_path, world_size=nproc, as_json=as_json
        )
    else:
        describe(
            subject,
            overrides or [],
            hf_path=hf_path,
            world_size=nproc,
            sequence_length=sequence_length,
            gpu=gpu,
            as_json=as_json,
        )


def describe(
    subject: str | None,
    overrides: Sequence[str],
    *,
    hf_path: Path | None,
    world_size: int | None,
    sequence_length: int | None,
    as_json: bool,
    gpu: str | None = None,
) -> None:
    """Print the figures of a recipe, a preset or a model's folder.

    Args:
        subject: recipe, run file, preset, or what else `find_architecture` takes; None with
            `hf_path`.
        overrides: `key=value` words for a recipe.
        hf_path: Hugging Face folder, in place of `subject`; else None.
        world_size: number of ranks, for memory and layout; None: the recipe's own.
        sequence_length: tokens a sequence, for the FLOPs; None: the recipe's, else the longest that
            the model takes.
        as_json: print JSON instead of tables.
        gpu: card whose memory a rank must fit, default none.

    Raises:
        InputError: no subject or two, an unknown name, or a layout that does not fit.
        typer.Exit: code 2, a rank does not fit the card.
    """
    from mellum2_megatron.planning.architecture_report import architecture_report, render
    from mellum2_megatron.planning.gpus import find_gpu
    from mellum2_megatron.planning.layout_report import layout_report, render_layout
    from mellum2_megatron.planning.memory import memory_per_rank
    from mellum2_megatron.planning.memory_fit import GIB, card_problem, card_report
    from mellum2_megatron.planning.step_time import CARDS, render_step, step_report, step_time

    if (subject is None) == (hf_path is None):
        raise InputError(
            "info", rule="describes one thing", fix="give a recipe, a preset, or --hf-path DIR"
        )
    memory = layout = run = problem = step = None
    card = None if gpu is None else find_gpu(gpu)
    if hf_path is not None:
        from conversion.huggingface.folder import read_config

        architecture, title = read_config(hf_path), str(hf_path)
    else:
        assert subject is not None
        run, architecture = _read_subject(subject, overrides)
        title = subject
        if run is not None:
            sequence_length = sequence_length or run.data.sequence_length
            ranks = world_size or run.layout.world_size or run.layout.smallest_world_size
            # Recipes are for GPUs, so the figures are too, even on a machine without one.
            backend = run.resolved_backend("cuda")
            memory = memory_per_rank(run, world_size=ranks, backend=backend)
            layout = layout_report(run, world_size=ranks)
            title = f"{subject} on {ranks} rank{'s' * (ranks > 1)}"
            if card is not None:
                problem = card_problem(run, world_size=ranks, gpu=card)
                if gpu in CARDS:
                    step = step_time(run, world_size=ranks, gpu=card)
    if card is not None and run is None:
        raise InputError(
            f"--gpu {gpu}", rule="memory is that of a run, not of a model", fix="name a recipe"
        )
    report = architecture_report(architecture, sequence_length=sequence_length, memory=memory)
    # In JSON null without a run or a card, so that the keys are always there.
    report |= {
        "layout": layout,
        "card": None if card is None else card_report(card, problem),
        "step": None if step is None else step_report(step),
    }
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        console.print(render(report, title=title))
        for table in render_layout(layout) if layout is not None else ():
            console.print()
            console.print(table)
        if step is not None and card is not None:
            console.print()
            console.print(render_step(step, gpu=card))
        if card is not None:
            console.print()
            print_line(
                str(problem) if problem else f"fits {card.label}: {card.memory / GIB:,.1f} GiB"
            )
    if problem is not None:
        raise typer.Exit(2)


def describe_optimizer(
    subject: str | None,
    overrides: Sequence[str],
    *,
    hf_path: Path | None,
    world_size: int | None,
    as_json: bool,
) -> None:
    """Print the update of each weight of a recipe's model; arguments as for `describe`.

    Names of weights are those of Transformer Engine's modules, unless the run sets `backend=torch`.

    Raises:
        InputError: not a recipe, an unknown name, or a layout that does not fit.
    """
    from mellum2_megatron.planning.optimizer_report import optimizer_report, render_optimizer

    run = None
    if subject is not None and hf_path is None:
        run, _ = _read_subject(subject, overrides)
    if run is None:
        given = "info --optimizer" if subject is None else f"info --optimizer {subject}"
        if hf_path is not None:
            given = f"--hf-path {hf_path}"
        raise InputError(
            given, rule="an optimizer is part of a run", fix="name one of `mellum2 recipes`"
        )
    ranks = world_size or run.layout.world_size or run.layout.smallest_world_size
    report = optimizer_report(run, world_size=ranks, backend=run.resolved_backend("cuda"))
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    title = f"{subject} on {ranks} rank{'s' * (ranks > 1)}"
    console.print(render_optimizer(report, title=title))


def _read_subject(subject: str, overrides: Sequence[str]) -> tuple[Run | None, Mellum2Architecture]:
    """Return a recipe's run and its architecture; a preset or folder has no run."""
    from mellum2_megatron.architecture import PRESETS, find_architecture
    from mellum2_megatron.planning.resolve import resolve_run
    from mellum2_megatron.recipes import recipe_names

    names_run = subject in recipe_names() or re.search(r"\.(ya?ml|py(:\w*)?)$", subject)
    if not names_run and (subject in PRESETS or Path(subject).expanduser().exists()):
        # A model is a constant. Overrides would describe one that no recipe trains.
        if overrides:
            raise InputError(
                f"{subject} {overrides[0]}",
                rule="overrides change a recipe",
                fix=f"name a recipe, and architecture={subject} after it",
            )
        return None, find_architecture(subject)[0]
    # Checked here, because `recipe` would suggest recipes only, not presets.
    if not names_run:
        raise InputError(
            f"{subject!r}",
            rule="is neither a recipe nor a preset, folder or file",
            fix=nearest(subject, [*recipe_names(), *PRESETS]),
        )
    run = resolve_run(subject, overrides)
    return run, run.architecture
