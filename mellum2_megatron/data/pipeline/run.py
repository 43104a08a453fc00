"""Runs a corpus plan on this machine, and reports what it did."""

from __future__ import annotations

import logging
from pathlib import Path

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import check_writable, write_text
from mellum2_megatron.common.stage_bars import stage_bars
from mellum2_megatron.data.phase_record import PLAN_FILE, PhaseRecord
from mellum2_megatron.data.pipeline.assemble import assemble
from mellum2_megatron.data.pipeline.graph import STAGES, Graph
from mellum2_megatron.data.pipeline.inputs import HASHES_FILE
from mellum2_megatron.data.pipeline.plan import Plan
from mellum2_megatron.data.pipeline.tasks import run_stage

logger = logging.getLogger(__name__)


def open_plan(plan: Plan, text: str, *, progress: bool = True) -> Graph:
    """List and hash a plan's inputs, and make its folder.

    Args:
        plan: the plan.
        text: content of its file, kept beside the results.
        progress: show a bar while inputs are hashed, on a terminal.

    Raises:
        InputError: see `Graph.of`; or the folder cannot be written.
    """
    assert plan.output is not None, "read_plan fills it in"
    results = Path(plan.output)
    check_writable("output", results, folder=True)
    # Hidden are the unfinished files of another process that begins at the same time.
    if results.is_dir() and any(not one.name.startswith(".") for one in results.iterdir()):
        # A killed first run may have left the hashes of its inputs alone.
        marks = (PLAN_FILE, HASHES_FILE)
        if not any((results / name).is_file() for name in marks):
            raise InputError(
                f"output {results}",
                rule="it has other files and is no plan's; a plan replaces and removes folders",
                fix="give an `output` of its own",
            )
    with stage_bars(progress, logger, unit="bytes") as start_stage:
        graph = Graph.of(plan, results, advance=start_stage("hashing the inputs", None))
    write_text(results / PLAN_FILE, text)
    return graph


def run_plan(
    graph: Graph,
    *,
    stage: str | None = None,
    part: tuple[int, int] = (0, 1),
    workers: int,
    progress: bool = True,
) -> list[PhaseRecord]:
    """Do what is missing of a plan, or of one stage.

    Args:
        graph: the plan's tasks.
        stage: stage to run; None (default): all, then the folders of the phases.
        part: number of a slice from 0, and number of slices; this call does every n-th task of the
            stage. Default: all.
        workers: processes.
        progress: show bars on a terminal.

    Returns:
        The phases, empty after a single stage.

    Raises:
        InputError: an unknown stage, one whose inputs are missing, bad input, or a source with too
            few tokens.
        WorkError: see `run_stage` and `assemble`.
    """
    if stage is not None and stage not in STAGES:
        raise InputError(
            f"--stage {stage}", rule="there is no such stage", fix=f"use {', '.join(STAGES)}"
        )
    with stage_bars(progress, logger, unit="tasks") as start_stage:
        for name in STAGES if stage is None else (stage,):
            tasks = graph.tasks(name)[part[0] :: part[1]]
            advance = start_stage(name, len(tasks))
            made = 0
            for _, ran in run_stage(tasks, graph.results, workers=workers):
                advance(1)
                made += ran
            logger.info("%s: %d tasks, %d of them new", name, len(tasks), made)
    return assemble(graph) if stage is None else []
