"""`mellum2 launch`: submit a recipe or a chain of stages; status, logs and cancel of what was
submitted."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mellum2_megatron.common.console import console, plain_table, print_line
from mellum2_megatron.common.errors import InputError, WorkError

if TYPE_CHECKING:
    from launchers.status import Status
    from launchers.submission import Submission


class _Group(TyperGroup):
    """Takes `launch RECIPE ...` for `launch run RECIPE ...`: no recipe is called like a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


launch_app = typer.Typer(
    cls=_Group,
    help="Submit runs to a cluster through NeMo-Run, and watch them: `mellum2 launch RECIPE ...`.",
    no_args_is_help=True,
    epilog="`mellum2 launch RECIPE --help` lists the options of a launch.",
)
Profile = Annotated[
    str | None, typer.Option("--profile", help="site profile, name or file (docs/launching.md)")
]
Nodes = Annotated[
    int | None, typer.Option("--nodes", min=1, help="nodes; default: what layout and profile say")
]
Time = Annotated[
    str | None,
    typer.Option("--time", help="time limit, as sbatch takes it; default: the profile's"),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="print run, layout, memory, estimate and script; write nothing"),
]
Render = Annotated[
    str | None,
    typer.Option("--render", metavar="sbatch", help="write the script, do not submit it"),
]
AllowDirty = Annotated[bool, typer.Option("--allow-dirty", help="take uncommitted changes along")]
AssumedTflops = Annotated[
    float | None,
    typer.Option("--assumed-tflops", min=0.001, help="model TFLOP/s of a rank, for the estimate"),
]
Which = Annotated[
    str,
    typer.Argument(metavar="RUN_FOLDER|JOB", help="a run's folder, or Slurm's number: 12 or 12_3"),
]


@launch_app.command("run")
def launch_run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN.yaml", help="recipe name, or a resolved run")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="overrides, e.g. layout.ep=8")
    ] = None,
    executor: Annotated[
        str | None, typer.Option("--executor", help="local or slurm; default: the profile's")
    ] = None,
    profile: Profile = None,
    nodes: Nodes = None,
    time: Time = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="ranks, with --executor local")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="folder of the run; default runs/RECIPE")
    ] = None,
    array: Annotated[
        list[str] | None,
        typer.Option(
            "--array",
            metavar="'KEY=VALUE ..'",
            help="overrides of one task of an array (repeatable)",
        ),
    ] = None,
    dry_run: DryRun = False,
    render: Render = None,
    allow_dirty: AllowDirty = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="show the training's log until the job has ended")
    ] = False,
    assumed_tflops: AssumedTflops = None,
) -> None:
    """Submit a run. The word `run` can be left out: `mellum2 launch RECIPE ...`."""
    from launchers.submission import choose_profile, prepare, run_to_launch

    _check_render(render)
    if follow and array:
        raise InputError(
            "--follow with --array",
            rule="one log is followed",
            fix="drop it; see `mellum2 launch logs`",
        )
    run = run_to_launch(recipe, overrides or [], output)
    chosen = choose_profile(executor, profile)
    prepared = prepare(
        run,
        chosen,
        nodes=nodes,
        time=time,
        nproc=nproc,
        sweep=[shlex.split(words) for words in array or []],
        allow_dirty=allow_dirty,
        show_only=dry_run,
    )
    if dry_run or render:
        _show([prepared], dry_run=dry_run, render=render, tflops=assumed_tflops)
        return
    if chosen.executor == "local":
        _run_here(prepared)
        return
    (number,) = _submit(prepared.job.name, [prepared])
    if follow:
        raise typer.Exit(_follow(prepared.job.folder, number, None))


@launch_app.command("pipeline")
def launch_pipeline(
    stages: Annotated[
        list[str],
        typer.Argument(
            metavar="STAGE [KEY=VALUE ..] STAGE ..",
            help="recipes or run files; overrides follow theirs",
        ),
    ],
    profile: Profile = None,
    nodes: Nodes = None,
    time: Time = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="folder of the runs' folders")
    ] = None,
    dry_run: DryRun = False,
    render: Render = None,
    allow_dirty: AllowDirty = False,
    assumed_tflops: AssumedTflops = None,
) -> None:
    """Submit stages at once, each starting from the former's last checkpoint when that has come to
    its end."""
    from launchers.submission import choose_profile, prepare_chain, run_to_launch, split_stages

    _check_render(render)
    runs = [run_to_launch(name, overrides, None) for name, overrides in split_stages(stages)]
    chosen = choose_profile("slurm", profile)
    prepared = prepare_chain(
        runs,
        chosen,
        root=output or Path(chosen.runs),
        nodes=nodes,
        time=time,
        allow_dirty=allow_dirty,
        show_only=dry_run,
    )
    if dry_run or render:
        _show(prepared, dry_run=dry_run, render=render, tflops=assumed_tflops)
        return
    _submit("-".join([prepared[0].job.name, "pipeline"]), prepared)


@launch_app.command("status")
def launch_status(
    which: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN_FOLDER|JOB] ..",
            help="runs' folders or Slurm's numbers; default: all in --runs",
        ),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="folder of runs' folders")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say where jobs are: Slurm's state, the step that is reached, and how the last attempt
    ended."""
    from launchers.status import find, launched, status

    words = which or [str(folder) for folder in launched(runs) if _on_slurm(folder)]
    if not words:
        raise InputError(
            f"--runs {runs}",
            rule="nothing was launched from there",
            fix="name a run's folder or a job",
        )
    found = [each for word in words for each in status(*find(word))]
    if as_json:
        plain = [
            dataclasses.asdict(each) | {"folder": each.folder and str(each.folder)}
            for each in found
        ]
        sys.stdout.write(json.dumps(plain, indent=2) + "\n")
    else:
        _print_status(found)


@launch_app.command("logs")
def launch_logs(
    which: Which,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="the log of the node that this rank is on")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="one node's, until the job has ended; default: the last rank's"
        ),
    ] = False,
) -> None:
    """Print a job's logs: the batch script's and each node's. The training's rows are in that of
    the last rank."""
    from launchers import slurm
    from launchers.status import find, log_files, rank_log

    folder, job = find(which)
    if folder is None:
        raise InputError(
            which, rule="Slurm no longer knows where its logs are", fix="give the run's folder"
        )
    number, task = slurm.job_number(job)
    tasks = [state.job_id for state in slurm.states(number)]
    if task is None and any("_" in each for each in tasks):
        raise InputError(
            which, rule=f"is an array of {len(tasks)} tasks", fix=f"name one, such as {tasks[0]}"
        )
    if follow:
        raise typer.Exit(_follow(folder, job, rank))
    script, nodes = log_files(folder, job)
    one = None if rank is None else rank_log(folder, job, rank)
    paths = [
        path for path in ([script, *nodes.values()] if rank is None else [one]) if path is not None
    ]
    if not paths:
        raise InputError(
            which, rule="has written no log yet", fix="`mellum2 launch status` says whether it runs"
        )
    for path in paths:
        if len(paths) > 1:
            sys.stdout.write(f"==> {path} <==\n")
        sys.stdout.write(path.read_text(encoding="utf-8", errors="replace"))


@launch_app.command("cancel")
def launch_cancel(
    which: Annotated[list[str], typer.Argument(metavar="RUN_FOLDER|JOB ..", help="what to cancel")],
) -> None:
    """Cancel jobs; what they have saved stays, and launching them again goes on from there."""
    from launchers import slurm
    from launchers.status import find

    slurm.require("scancel")
    jobs = [find(word)[1] for word in which]
    slurm.cancel(jobs)
    print_line(f"cancelled {', '.join(jobs)}")


def _check_render(render: str | None) -> None:
    if render not in (None, "sbatch"):
        raise InputError(f"--render {render}", rule="there is sbatch", fix="use --render sbatch")


def _show(
    prepared: Sequence[Submission], *, dry_run: bool, render: str | None, tflops: float | None
) -> None:
    from launchers.batch_job import write_job
    from launchers.preview import show
    from launchers.sbatch import render as render_script

    scripts = []
    for each in prepared:
        local = each.job.profile.executor == "local"
        if render and local:
            raise InputError(
                "--render sbatch", rule="is for Slurm", fix="name a Slurm profile with --profile"
            )
        if not render:
            script = None if local else render_script(each.job)
            notes = [
                *each.package.notes,
                *(f"Would be refused now: {problem}" for problem in each.problems),
            ]
            show(console, each.job, script, tflops=tflops, notes=notes)
            continue
        for problem in each.problems:
            sys.stderr.write(f"would be refused now: {problem}\n")
        if not dry_run:
            each.write_code()
            scripts.append((each, write_job(each.job)))
        sys.stdout.write(render_script(each.job))
    for each, path in scripts:
        waits = "--dependency=afterok:JOB --kill-on-invalid-dep=yes " if each.after else ""
        note = f"  # JOB is the number of {each.after[0]}" if each.after else ""
        sys.stderr.write(f"written; submit it with: sbatch {waits}{shlex.quote(str(path))}{note}\n")


def _submit(title: str, prepared: Sequence[Submission]) -> list[str]:
    from launchers import slurm
    from launchers.launch_record import read_launches
    from launchers.preview import warnings
    from launchers.status import require_idle
    from launchers.submission import require_nemo_run

    slurm.require()
    require_nemo_run()
    for each in prepared:
        require_idle(each.job.folder)
    from launchers import nemo

    lines = [line for each in prepared for line in (*each.package.notes, *warnings(each.job))]
    for line in dict.fromkeys(lines):  # a chain's stages have the same to say
        print_line(line)
    for each in prepared:
        each.write_code()
    nemo.submit(title, prepared)
    numbers = []
    for each in prepared:
        launch = read_launches(each.job.folder)[-1]
        numbers.append(launch.job_id)
        tasks = f", {launch.tasks} tasks" if launch.tasks else ""
        waits = f", after {', '.join(each.after)}" if each.after else ""
        print_line(f"job {launch.job_id}{tasks}{waits}: {each.job.name} in {each.job.folder}")
    print_line(
        f"`mellum2 launch status {numbers[0]}`, `logs` and `cancel` take the number or the folder"
    )
    return numbers


def _run_here(prepared: Submission) -> None:
    from launchers.submission import require_nemo_run

    require_nemo_run()
    from launchers import nemo

    prepared.write_code()
    if not nemo.run_here(prepared.job):
        raise WorkError(
            f"{prepared.job.name} did not come to its end",
            fix="see above; the same command goes on from the last checkpoint",
        )


def _follow(folder: Path, job: str, rank: int | None) -> int:
    """Show a rank's log until the job has ended; return 0 if it succeeded, else 1."""
    from launchers.status import ended, follow, rank_log, status

    for line in follow(lambda: rank_log(folder, job, rank), ended(job)):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    found = status(folder, job)
    _print_status(found)
    return 0 if all(each.state == "COMPLETED" for each in found) else 1


def _print_status(found: Sequence[Status]) -> None:
    table = plain_table()
    for column in ("job", "state", "step", "starts", "elapsed", "nodes", "run"):
        table.add_column(
            column,
            no_wrap=column != "run",
            justify="right" if column in ("step", "starts") else "left",
        )
    for each in found:
        table.add_row(
            each.job_id,
            each.state,
            "-" if each.step is None else str(each.step),
            str(each.attempts),
            each.elapsed or "-",
            each.nodes or "-",
            "-" if each.folder is None else str(each.folder),
        )
    console.print(table)
    for each in found:
        if each.reason:
            print_line(f"{each.job_id}: {each.reason}")


def _on_slurm(folder: Path) -> bool:
    from launchers.launch_record import read_launches

    return read_launches(folder)[-1].executor == "slurm"
