"""`mellum2 data plan | run | report`: a corpus from sources to the packs of every phase."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mellum2_megatron.cli.data import data_app
from mellum2_megatron.common.console import console, print_line
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import size_text

if TYPE_CHECKING:
    from mellum2_megatron.data.pipeline.graph import Graph

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="corpus plan")]


def _open(file: Path) -> Graph:
    from mellum2_megatron.common.files import read_text
    from mellum2_megatron.data.pipeline.plan_file import faults_of, read_plan
    from mellum2_megatron.data.pipeline.run import open_plan

    plan = read_plan(file)
    text = read_text(file, str(file), fix="name a plan file")
    with faults_of(file):
        return open_plan(plan, text)


@data_app.command("plan")
def plan_command(file: PlanFile) -> None:
    """Show what a corpus plan needs: tokens, passes, FIM, missing data, disk and time.

    Before the plan has run, tokens are estimated from a sample of every source. Exit code 2 if
    tokens are missing.
    """
    from rich.table import Table

    from mellum2_megatron.data.pipeline.estimate import estimate
    from mellum2_megatron.data.pipeline.plan_file import faults_of
    from mellum2_megatron.data.pipeline.summary import counted, needs, shortages

    graph = _open(file)
    if graph.counted():
        available = counted(graph)
        print_line("tokens: counted")
    else:
        with faults_of(file):
            estimates = {name: estimate(graph, name) for name in graph.plan.sources}
        available = {name: one.tokens for name, one in estimates.items()}
        table = Table("source", "files", "size", "tokens", "kept", "core-hours", "disk")
        for name, one in estimates.items():
            table.add_row(
                name,
                f"{one.files:,}",
                size_text(one.bytes),
                f"{one.tokens / 1e6:,.1f}M",
                f"{one.kept:.0%}",
                f"{one.core_hours:,.2f}",
                size_text(one.disk),
            )
        console.print(table)
        print_line("estimated from a sample, before duplicates are dropped")
    table = Table("phase", "source", "share", "needs", "has", "passes", "FIM", "joined", "missing")
    for need in needs(graph, available):
        table.add_row(
            str(need.phase),
            need.source,
            f"{need.share:.1f}%",
            f"{need.needed / 1e6:,.1f}M",
            f"{need.available / 1e6:,.1f}M",
            f"{need.passes:.2f} of {need.allowed:g}",
            f"{need.fim:.0%}",
            f"{need.joined:.0%}" if need.joined else "-",
            f"{need.missing:,}" if need.missing else "-",
        )
    console.print(table)
    if any(phase.repository for phase in graph.plan.phases):
        print_line("joined: share of the repositories whose files make one document")
    packed = sum(phase.tokens for phase in graph.plan.phases)
    width = 2 if graph.tokenizer["vocab_size"] < 65500 else 4
    print_line(f"packs: {packed / 1e6:,.1f}M tokens, {size_text(packed * width)}")
    print_line(f"encodes with {graph.tokenizer['engine']}: {graph.tokenizer['engine_reason']}")
    with faults_of(file):
        for shortage in shortages(graph, available):
            raise shortage.error()


@data_app.command("run")
def run_command(
    file: PlanFile,
    stage: Annotated[
        str | None, typer.Option("--stage", help="run one stage only; default: all in order")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option("--slice", help="I/N: every N-th task of the stage from I on; default: all"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="processes; default: one per core")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", help="Slurm site profile: submit a job array for each stage"),
    ] = None,
    array_tasks: Annotated[
        int, typer.Option("--array-tasks", min=1, help="largest number of tasks of an array")
    ] = 64,
) -> None:
    """Do what is missing of a corpus plan, and make the folders of its phases.

    May be stopped and started again at any time, with any number of workers: the result is the
    same.
    """
    from mellum2_megatron.data.pipeline.plan_file import faults_of
    from mellum2_megatron.data.pipeline.run import run_plan
    from mellum2_megatron.data.pipeline.summary import left_out_rows

    slices = _slice(part, stage)
    if profile is not None:
        _submit(file, profile, stage, part, array_tasks)
        return
    graph = _open(file)
    with faults_of(file):
        records = run_plan(
            graph, stage=stage, part=slices, workers=workers or len(os.sched_getaffinity(0))
        )
    if stage is not None:
        print_line(f"stage {stage} is done")
        return
    for source, count, reason, first in left_out_rows(graph):
        print_line(f"{source}: left out: {count:,} {reason} (first: {first})")
    for record in records:
        packs = ", ".join(f"{name} {count:,}" for name, count in record.packs.items())
        print_line(
            f"phase {record.phase}: {record.samples:,} sequences of "
            f"{record.sequence_length:,} tokens; packs: {packs}"
        )
    print_line(
        f"next: mellum2 train RECIPE data.path={graph.results} data.phase=1 "
        f"data.sequence_length={records[0].sequence_length}"
    )


def _slice(text: str | None, stage: str | None) -> tuple[int, int]:
    """Return the number of a slice and the number of slices."""
    if text is None:
        return 0, 1
    number, bar, count = text.partition("/")
    digits = number.isascii() and number.isdigit() and count.isascii() and count.isdigit()
    if not (bar and digits and int(number) < int(count) < 2**31):
        raise InputError(
            f"--slice {text}", rule="it is I/N with 0 <= I < N", fix="use 0/4, 1/4, 2/4 and 3/4"
        )
    if stage is None:
        raise InputError(
            f"--slice {text}",
            rule="a slice is of one stage: the next one needs all of it",
            fix="add --stage",
        )
    return int(number), int(count)


def _submit(
    file: Path, profile_name: str, stage: str | None, part: str | None, array_tasks: int
) -> None:
    """Submit the stages that are not done as job arrays."""
    from launchers import slurm
    from launchers.corpus_arrays import check_profile, project_folder, submit, write_scripts
    from launchers.profile import read_profile
    from mellum2_megatron.data.pipeline.graph import STAGES
    from mellum2_megatron.data.pipeline.plan_file import faults_of

    if stage is not None or part is not None:
        raise InputError(
            f"--profile {profile_name} with --stage or --slice",
            rule="a submission runs all that is missing",
            fix="drop one of the two",
        )
    profile = read_profile(profile_name)
    check_profile(profile)
    slurm.require()
    graph = _open(file)
    missing = []
    for name in STAGES:
        # The tasks of the last stage are known once the tokens are counted.
        if name == STAGES[-1] and not graph.counted():
            missing.append((name, 0))
            continue
        with faults_of(file):
            tasks = graph.tasks(name)
        if not all(task.done(graph.results) for task in tasks):
            missing.append((name, len(tasks)))
    jobs = write_scripts(
        file.resolve(), graph.results, profile, missing, slices=array_tasks, code=project_folder()
    )
    for job, number in zip(jobs, submit(jobs), strict=True):
        print_line(f"job {number}: {job.stage or 'phases'}, {job.slices} tasks")
    print_line(f"logs: {graph.results / 'logs'}; status: squeue --me")


@data_app.command("report")
def report_command(file: PlanFile) -> None:
    """Write a page with tables and pictures about a corpus plan that has run."""
    from mellum2_megatron.data.pipeline.plan_file import faults_of
    from mellum2_megatron.data.pipeline.report import write_report

    graph = _open(file)
    with faults_of(file):
        print_line(f"wrote {write_report(graph)}")
