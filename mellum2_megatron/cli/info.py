"""`mellum2 info`: what is asked about, and the report on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mellum2_megatron.architecture import PRESETS, Mellum2Architecture
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.config import Run
from mellum2_megatron.planning.architecture_report import architecture_report, render
from mellum2_megatron.planning.layout_report import layout_report, render_layout
from mellum2_megatron.planning.memory import memory_per_rank
from mellum2_megatron.planning.optimizer_report import optimizer_report, render_optimizer
from mellum2_megatron.planning.resolve import resolve_run
from mellum2_megatron.recipes import recipe_names


def describe(
    console: Console,
    *,
    subject: str | None,
    overrides: Sequence[str],
    hf_path: Path | None,
    world_size: int | None,
    sequence_length: int | None,
    as_json: bool,
) -> None:
    """Print the figures of a recipe, a preset or a Hugging Face folder.

    Args:
        console: where tables go.
        subject: recipe (or resolved run file) or preset.
        overrides: `key=value` words for a recipe.
        hf_path: Hugging Face folder, in place of `subject`.
        world_size: ranks, for the memory of one; those the recipe asks for if None.
        sequence_length: for the FLOPs; the recipe's or the model's longest if None.
        as_json: print JSON instead of tables.

    Raises:
        InputError: nothing or two things asked about, an unknown name, or a layout that does not
            fit.
    """
    if (subject is None) == (hf_path is None):
        raise InputError(
            "info", rule="describes one thing", fix="give a recipe, a preset, or --hf-path DIR"
        )
    memory = layout = None
    if hf_path is not None:
        from conversion.huggingface.folder import read_config

        architecture, title = read_config(hf_path), str(hf_path)
    else:
        assert subject is not None
        title = subject
        named = _run_or_architecture(subject, overrides)
        if isinstance(named, Run):
            architecture = named.architecture
            sequence_length = sequence_length or named.data.sequence_length
            ranks = world_size or named.layout.world_size or named.layout.smallest_world_size
            memory = memory_per_rank(
                named, world_size=ranks, backend=named.resolved_backend("cuda")
            )
            layout = layout_report(named, world_size=ranks)
            title = f"{subject} on {ranks} rank{'s' * (ranks > 1)}"
        else:
            architecture = named
    report = architecture_report(architecture, sequence_length=sequence_length, memory=memory) | {
        "layout": layout
    }
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        console.print(render(report, title=title))
        for table in render_layout(layout) if layout is not None else ():
            console.print()
            console.print(table)


def describe_optimizer(
    console: Console,
    *,
    subject: str | None,
    overrides: Sequence[str],
    hf_path: Path | None,
    world_size: int | None,
    as_json: bool,
) -> None:
    """Print how each weight of a recipe's model is updated; arguments as for `describe`.

    Weights have the names that Transformer Engine's modules give them, unless the run says
    `backend=torch`.

    Raises:
        InputError: not a recipe, an unknown name, or a layout that does not fit.
    """
    run = (
        None if subject is None or hf_path is not None else _run_or_architecture(subject, overrides)
    )
    if not isinstance(run, Run):
        given = (
            f"--hf-path {hf_path}"
            if hf_path is not None
            else f"info --optimizer {subject or ''}".rstrip()
        )
        raise InputError(
            given, rule="an optimizer is part of a run", fix="name one of `mellum2 recipes`"
        )
    ranks = world_size or run.layout.world_size or run.layout.smallest_world_size
    report = optimizer_report(run, world_size=ranks, backend=run.resolved_backend("cuda"))
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        console.print(
            render_optimizer(report, title=f"{subject} on {ranks} rank{'s' * (ranks > 1)}")
        )


def _run_or_architecture(subject: str, overrides: Sequence[str]) -> Run | Mellum2Architecture:
    if subject in PRESETS:
        if overrides:
            raise InputError(
                f"{subject} {overrides[0]}",
                rule="overrides change a recipe",
                fix="name a recipe instead of a preset",
            )
        return PRESETS[subject]
    if subject in recipe_names() or subject.endswith((".yaml", ".yml")):
        return resolve_run(subject, overrides)
    raise InputError(
        f"{subject!r}",
        rule="is neither a recipe nor a preset",
        fix=nearest(subject, [*recipe_names(), *PRESETS]),
    )
