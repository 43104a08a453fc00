"""`mellum2 ablate`: ask a question of the recipes, run it, and read the answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mellum2_megatron.cli.options import AsJson
from mellum2_megatron.common.console import console, print_line
from mellum2_megatron.common.errors import InputError, WorkError

if TYPE_CHECKING:
    from ablations.answering.comparison import Comparison
    from ablations.asking.planned import Plan
    from ablations.running.tasks import Progress

ablate_app = typer.Typer(
    help="Ablations: train the arms of a study on several seeds, and compare them.",
    no_args_is_help=True,
)
Name = Annotated[
    str, typer.Argument(metavar="NAME|FILE.py", help="ablation of `mellum2 ablate list`, or a file")
]
ScaleChoice = Annotated[
    str, typer.Option("--scale", help="tiny (CPU), proxy (one GPU) or full (the report's tokens)")
]
Results = Annotated[Path, typer.Option("--results", help="folder of all results")]
DataFolders = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="[NAME=]DIR",
        help="folder of a data set of the study, in place of its own (repeatable)",
    ),
]
Seeds = Annotated[
    int | None, typer.Option("--seeds", min=1, help="seeds of each arm; default: the first look's")
]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="ARM", help="run this arm (repeatable)")
]
ForRelease = Annotated[
    bool,
    typer.Option("--for-release", help="refuse arms that the released format cannot hold"),
]
RESULTS = Path("ablation_results")


@ablate_app.command("list")
def ablate_list(as_json: AsJson = False) -> None:
    """List this project's ablations with their questions."""
    from ablations.asking.finding import find_study, shipped
    from mellum2_megatron.common.console import plain_table

    studies = [find_study(name) for name in shipped()]
    if as_json:
        rows = [
            {"name": one.name, "question": one.study.question, "file": str(one.file)}
            for one in studies
        ]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = plain_table("ablation", "question")
    for one in studies:
        table.add_row(one.name, one.study.question + (" (GPU)" if one.study.gpu else ""))
    console.print(table)


@ablate_app.command("show")
def ablate_show(
    name: Name,
    scale: ScaleChoice = "tiny",
    data: DataFolders = None,
    for_release: ForRelease = False,
    as_json: AsJson = False,
) -> None:
    """Show the arms as a table of differences, with sizes and cost. Runs nothing."""
    from ablations.asking.table import render_study, study_rows

    plan = _plan(name, scale, data, for_release=for_release)
    if as_json:
        sys.stdout.write(json.dumps(study_rows(plan), indent=2) + "\n")
    else:
        console.print(render_study(plan))


@ablate_app.command("data")
def ablate_data(name: Name, scale: ScaleChoice = "tiny", data: DataFolders = None) -> None:
    """Make the data of a study that are not there yet."""
    from ablations.asking.planned import missing_data
    from ablations.running.make_data import make_data

    missing = missing_data(_plan(name, scale, data))
    make_data(missing)
    print_line(f"{len(missing)} data sets made; next: mellum2 ablate run {name} --scale {scale}")


@ablate_app.command("run")
def ablate_run(
    name: Name,
    scale: ScaleChoice = "tiny",
    executor: Annotated[
        str, typer.Option("--executor", help="local: this machine; slurm: an array of jobs")
    ] = "local",
    profile: Annotated[
        str | None, typer.Option("--profile", help="site profile, with --executor slurm")
    ] = None,
    seeds: Seeds = None,
    only: Only = None,
    data: DataFolders = None,
    results: Results = RESULTS,
    parallel: Annotated[
        int | None,
        typer.Option("--parallel", min=1, help="tasks at a time; default: as cores allow"),
    ] = None,
    wandb_project: Annotated[
        str | None,
        typer.Option(
            "--wandb-project", help="log to W&B, the study as a group; offline without key"
        ),
    ] = None,
    for_release: ForRelease = False,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="accept uncommitted changes, with slurm")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the tasks with hashes, and stop")
    ] = False,
) -> None:
    """Train what is missing or failed of a study. Finished tasks are never run again.

    Give it again after a kill, or with more --seeds.
    Exit code 1: a task failed; the others have run.
    """
    from ablations.running.statement import state
    from ablations.running.status import render_status, render_tasks

    if executor not in ("local", "slurm"):
        raise InputError(
            f"--executor {executor}", rule="there are local and slurm", fix="use one of them"
        )
    plan = _plan(name, scale, data, for_release=for_release)
    progress = _progress(name, plan, results, seeds, only, wandb_project)
    if dry_run:
        console.print(render_tasks(progress))
        return
    if any(entry.todo != "nothing" for entry in progress):
        state(plan.study, results / plan.name / plan.scale)
    group = {"WANDB_RUN_GROUP": f"{plan.name}-{plan.scale}"}
    if executor == "slurm":
        from ablations.running.slurm_array import submit_tasks

        for line in submit_tasks(plan, progress, results, profile, group, allow_dirty=allow_dirty):
            print_line(line)
        return
    if profile is not None:
        raise InputError(
            f"--profile {profile}", rule="is for a cluster", fix="add --executor slurm, or drop it"
        )
    from ablations.running.evaluations import evaluations_of
    from ablations.running.pool import Pool, Slots
    from mellum2_megatron.planning.resolve import resolve_device

    device = resolve_device(plan.device)
    slots = Slots.on_this_machine(plan.world_size, device, parallel)
    pool = Pool(
        results=results.absolute(),
        slots=slots,
        device=device,
        environment=group,
    )
    failed = pool.run(progress)
    after = _progress(name, plan, results, seeds, only, wandb_project)
    console.print(render_status(f"{plan.name}, {plan.scale}", after))
    if failed:
        raise WorkError(
            f"{len(failed)} of {len(after)} tasks failed",
            fix="read their logs above; the same command runs them again",
        )
    following = "evaluate" if evaluations_of(plan.study) else "report"
    print_line(f"next: mellum2 ablate {following} {name} --scale {plan.scale} --results {results}")


@ablate_app.command("status")
def ablate_status(
    name: Name,
    scale: ScaleChoice = "tiny",
    seeds: Seeds = None,
    data: DataFolders = None,
    results: Results = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Show the tasks of a study as a matrix of arms and seeds."""
    from ablations.running.results import tasks_on_disk
    from ablations.running.status import render_status, status_rows

    plan = _plan(name, scale, data)
    if seeds is None:
        found = tasks_on_disk(results, plan.name, plan.scale)
        seeds = max([plan.study.seeds[0], *(task.record.seed for task in found)])
    progress = _progress(name, plan, results, seeds, None, None)
    if as_json:
        sys.stdout.write(json.dumps(status_rows(progress), indent=2) + "\n")
    else:
        console.print(render_status(f"{plan.name}, {plan.scale}", progress))


@ablate_app.command("evaluate")
def ablate_evaluate(name: Name, scale: ScaleChoice = "tiny", results: Results = RESULTS) -> None:
    """Take the measures of `mellum2 eval` that a study compares by, of its finished tasks.

    A task that has them is not measured again. Exit code 1: a measure failed; the others are there.
    """
    from ablations.asking.finding import find_study
    from ablations.asking.planned import require_scale
    from ablations.running.evaluations import EVALUATIONS, evaluate_tasks, evaluations_of
    from ablations.running.results import tasks_on_disk

    named = find_study(name)
    if not evaluations_of(named.study):
        raise InputError(
            f"study {named.name}",
            rule="no metric of it comes from `mellum2 eval`",
            fix=f"add one of {', '.join(EVALUATIONS)} to its metrics",
        )
    known = require_scale(named.study, scale)
    tasks = list(tasks_on_disk(results, named.name, known))
    if not any(task.record.state == "done" for task in tasks):
        raise InputError(
            f"{results / named.name / known}",
            rule="no finished task is there to measure",
            fix=f"run `mellum2 ablate run {name} --scale {known} --results {results}`",
        )
    failed = list(evaluate_tasks(named.study, tasks))
    if failed:
        raise WorkError("; ".join(failed), fix="read the messages above; give the command again")
    print_line(f"next: mellum2 ablate report {name} --scale {known} --results {results}")


@ablate_app.command("report")
def ablate_report(
    name: Name,
    scale: ScaleChoice = "tiny",
    results: Results = RESULTS,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="folder to write; default: RESULTS/NAME/SCALE/report"),
    ] = None,
) -> None:
    """Write the answers of a study: Markdown, CSV, pictures and one HTML page.

    All of it is made anew from the files of the runs.
    """
    from ablations.answering.report import REPORT, write_report

    comparison = _comparison(name, scale, results)
    folder = output or results / comparison.name / comparison.scale / REPORT
    print_line(f"wrote {write_report(comparison, folder)}")


@ablate_app.command("log")
def ablate_log(
    name: Name,
    scale: ScaleChoice = "tiny",
    results: Results = RESULTS,
    file: Annotated[Path, typer.Option("--file", help="log to append to, made if missing")] = Path(
        "ablations/LOG.md"
    ),
) -> None:
    """Append a dated entry to the log of ablations, made from the files of the runs.

    Refused before the first look at the seeds, and for runs that have an entry.
    """
    from ablations.answering.log import append_entry

    append_entry(_comparison(name, scale, results), file)
    print_line(f"appended to {file}")


def _comparison(name: str, scale: str, results: Path) -> Comparison:
    """Return the finished runs of a study, compared."""
    from ablations.answering.comparison import compare
    from ablations.running.results import tasks_on_disk
    from ablations.running.statement import read_statement

    plan = _plan(name, scale, None)
    folder = results / plan.name / plan.scale
    tasks = list(tasks_on_disk(results, plan.name, plan.scale))
    if not any(task.record.state == "done" for task in tasks):
        raise InputError(
            f"{folder}",
            rule="no task of the study has finished there",
            fix=f"run `mellum2 ablate run {name} --scale {plan.scale}`, or give --results",
        )
    return compare(plan, tasks, read_statement(folder))


def _plan(name: str, scale: str, data: list[str] | None, *, for_release: bool = False) -> Plan:
    """Return the study at a scale."""
    from ablations.asking.finding import find_study
    from ablations.asking.planned import plan_study, require_scale

    named = find_study(name)
    return plan_study(
        named,
        require_scale(named.study, scale),
        folders=_folders(data),
        for_release=for_release,
    )


def _folders(words: list[str] | None) -> dict[str, str]:
    """Read ``--data``; a folder without a name is the data set `code`, that of the tiny scale."""
    folders = {}
    for word in words or []:
        name, equals, folder = word.rpartition("=")
        folders[name if equals else "code"] = folder
    return folders


def _progress(
    word: str,
    plan: Plan,
    results: Path,
    seeds: int | None,
    only: list[str] | None,
    wandb_project: str | None,
) -> list[Progress]:
    from ablations.asking.planned import require_data
    from ablations.running.slurm_array import folders_in_queue
    from ablations.running.tasks import examine, seeds_upto, tasks_of

    for arm in only or ():
        plan.arm(arm)
    require_data(plan, word)
    count = seeds or plan.study.seeds[0]
    tasks = tasks_of(
        plan,
        results,
        list(seeds_upto(count)),
        arms=only or (),
        wandb_project=wandb_project,
    )
    return examine(tasks, results, jobs=folders_in_queue(plan, results))
