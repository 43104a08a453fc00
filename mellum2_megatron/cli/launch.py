"""`mellum2 launch`: submit runs to a cluster; show status and logs, and cancel."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mellum2_megatron.checkpoint.folder import how_to_resume
from mellum2_megatron.cli.options import AsJson, Card, Overrides, RecipeOrRun
from mellum2_megatron.common.console import console, plain_table, print_line
from mellum2_megatron.common.errors import InputError, WorkError

if TYPE_CHECKING:
    from launchers.profile import Profile as SiteProfile
    from launchers.status import Status
    from launchers.submission import Submission
    from mellum2_megatron.config import Run


class _RecipeOrCommand(TyperGroup):
    """Command group that reads `launch RECIPE ...` as `launch run RECIPE ...`.

    No recipe has the name of a command (`launchers.submission.COMMANDS`, tested).
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


launch_app = typer.Typer(
    cls=_RecipeOrCommand,
    help="Submit runs to a cluster through NeMo-Run, and watch them: `mellum2 launch RECIPE ...`.",
    no_args_is_help=True,
    epilog="`mellum2 launch RECIPE --help` lists the options of a launch.",
)
Profile = Annotated[
    str | None, typer.Option("--profile", help="site profile, name or file (docs/launching.md)")
]
Nodes = Annotated[
    int | None, typer.Option("--nodes", min=1, help="nodes; default: from layout and profile")
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
AllowDirty = Annotated[bool, typer.Option("--allow-dirty", help="accept uncommitted changes")]
AssumedTflops = Annotated[
    float | None,
    typer.Option("--assumed-tflops", min=0.001, help="model TFLOP/s of a rank, for the estimate"),
]
JOB_HELP = "run folder, or a job number of Slurm: 12 or 12_3"


@launch_app.command("run")
def launch_run(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    executor: Annotated[
        str | None, typer.Option("--executor", help="local or slurm; default: the profile's")
    ] = None,
    profile: Profile = None,
    nodes: Nodes = None,
    gpu: Card = None,
    time: Time = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="ranks, with --executor local")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="run folder; default: runs/NAME")
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
    from launchers.submission import (
        choose_profile,
        prepare,
        require_nemo_run,
        run_to_launch,
        with_weights,
    )

    _check_render(render)
    if follow and array:
        raise InputError(
            "--follow with --array",
            rule="one log is followed",
            fix="drop it; see `mellum2 launch logs`",
        )
    run = run_to_launch(recipe, overrides or [], output)
    site = _on_card(choose_profile(executor, profile), gpu)

    def submission_of(run: Run) -> list[Submission]:
        prepared = prepare(
            run,
            site,
            nodes=nodes,
            time=time,
            nproc=nproc,
            sweep=[_overrides_of_task(words) for words in array or []],
            allow_dirty=allow_dirty,
            show_only=dry_run,
        )
        return [prepared]

    (submission,) = with_weights(run, site, submission_of, show_only=dry_run)
    if dry_run or render:
        _show([submission], dry_run=dry_run, render=render, tflops=assumed_tflops)
    elif site.executor == "local":
        require_nemo_run()
        # After the check, which names the extra that installs NeMo-Run.
        from launchers import nemo

        submission.write_code()
        if not nemo.run_here(submission.job):
            raise WorkError(
                f"{submission.job.name} did not finish",
                fix=f"see above; {how_to_resume(submission.job.folder)}",
            )
    else:
        (job_id,) = _submit(submission.job.name, [submission])  # an array is one job too
        if follow:
            raise typer.Exit(_follow(submission.job.folder, job_id, None))


@launch_app.command("pipeline")
def launch_pipeline(
    stages: Annotated[
        list[str],
        typer.Argument(
            metavar="STAGE [KEY=VALUE ..] STAGE ..",
            help="recipes or run files, each followed by its overrides",
        ),
    ],
    profile: Profile = None,
    nodes: Nodes = None,
    gpu: Card = None,
    time: Time = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="folder of the run folders; default: the profile's runs"),
    ] = None,
    dry_run: DryRun = False,
    render: Render = None,
    allow_dirty: AllowDirty = False,
    assumed_tflops: AssumedTflops = None,
) -> None:
    """Submit several stages at once.

    Each starts from the last checkpoint of the stage before it, once that is finished.
    """
    from launchers.submission import (
        choose_profile,
        prepare_chain,
        run_to_launch,
        split_stages,
        with_weights,
    )

    _check_render(render)
    runs = [run_to_launch(name, overrides, None) for name, overrides in split_stages(stages)]
    site = _on_card(choose_profile("slurm", profile), gpu)

    def submissions_of(*first: Run) -> tuple[Submission, ...]:
        return prepare_chain(
            [*first, *runs[1:]],
            site,
            root=output or Path(site.runs),
            nodes=nodes,
            time=time,
            allow_dirty=allow_dirty,
            show_only=dry_run,
        )

    root = output or Path(site.runs)
    submissions = (
        with_weights(runs[0], site, submissions_of, root=root, show_only=dry_run)
        if runs
        else submissions_of()  # refuses it
    )
    if dry_run or render:
        _show(submissions, dry_run=dry_run, render=render, tflops=assumed_tflops)
    else:
        _submit(f"{submissions[0].job.name}-pipeline", submissions)


@launch_app.command("status")
def launch_status(
    which: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN_FOLDER|JOB] ..",
            help="run folders or job numbers of Slurm; default: all in --runs",
        ),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="folder of the run folders")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show the progress of jobs: state in Slurm, last step, end of the last attempt."""
    from launchers.launch_record import read_launches
    from launchers.status import find_job, job_status, launched_folders

    # A run that was launched on this machine has no job to ask Slurm about.
    words = which or [
        str(folder)
        for folder in launched_folders(runs)
        if read_launches(folder)[-1].executor == "slurm"
    ]
    if not words:
        raise InputError(
            f"--runs {runs}",
            rule="nothing was launched from there",
            fix="name a run's folder or a job",
        )
    statuses = [status for word in words for status in job_status(*find_job(word))]
    if as_json:
        # JSON has no paths; a job without a run folder keeps null.
        plain = [
            dataclasses.asdict(status) | {"folder": status.folder and str(status.folder)}
            for status in statuses
        ]
        sys.stdout.write(json.dumps(plain, indent=2) + "\n")
    else:
        _print_statuses(statuses)


@launch_app.command("logs")
def launch_logs(
    which: Annotated[str, typer.Argument(metavar="RUN_FOLDER|JOB", help=JOB_HELP)],
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="only the log of this rank's node")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="show one log, by default the last rank's, until the job has ended"
        ),
    ] = False,
) -> None:
    """Print the logs of a job: the batch script's, then each node's.

    The log of the last rank's node has the training's rows.
    """
    from launchers import slurm
    from launchers.status import find_job, log_files, rank_log

    folder, job = find_job(which)
    if folder is None:
        raise InputError(
            which, rule="Slurm no longer has the folder of its logs", fix="give the run's folder"
        )
    number, task = slurm.job_number(job)
    # Each task of an array has its own logs, so a task must be named.
    tasks = [state.job_id for state in slurm.states(number)]
    if task is None and any("_" in job_id for job_id in tasks):
        raise InputError(
            which, rule=f"is an array of {len(tasks)} tasks", fix=f"name one, such as {tasks[0]}"
        )
    if follow:
        raise typer.Exit(_follow(folder, job, rank))
    if rank is None:
        script, nodes = log_files(folder, job)
        logs = [script, *nodes.values()]
    else:
        logs = [rank_log(folder, job, rank)]
    paths = [path for path in logs if path is not None]
    if not paths:
        raise InputError(
            which,
            rule="has written no log yet",
            fix="`mellum2 launch status` shows whether it runs",
        )
    for path in paths:
        # As `tail` does for several files.
        if len(paths) > 1:
            sys.stdout.write(f"==> {path} <==\n")
        sys.stdout.write(path.read_text(encoding="utf-8", errors="replace"))


@launch_app.command("cancel")
def launch_cancel(
    which: Annotated[list[str], typer.Argument(metavar="RUN_FOLDER|JOB ..", help=JOB_HELP)],
) -> None:
    """Cancel jobs. Checkpoints stay; the same launch command resumes from the last one."""
    from launchers import slurm
    from launchers.status import find_job

    slurm.require("scancel")
    jobs = [find_job(word)[1] for word in which]
    results = [slurm.cancel(job) for job in jobs]
    for result in results:
        print_line(f"{result.job_id}: {result.note}")
    failed = [result.job_id for result in results if not result.done]
    if failed:
        raise WorkError(
            f"{', '.join(failed)} not cancelled",
            fix="see above; `squeue --me` lists the jobs that are yours",
        )


def _on_card(site: SiteProfile, gpu: str | None) -> SiteProfile:
    """Return the profile with the card of the command line, if one is given there."""
    from mellum2_megatron.planning.gpus import find_gpu

    if gpu is None:
        return site
    find_gpu(gpu)
    return dataclasses.replace(site, gpu=gpu)


def _overrides_of_task(words: str) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError as error:  # an unclosed quote
        raise InputError(
            f"--array {words}",
            rule=f"is KEY=VALUE words, quoted as in a shell ({error})",
            fix="close the quote, or write it without",
        ) from None


def _check_render(render: str | None) -> None:
    if render not in (None, "sbatch"):
        raise InputError(f"--render {render}", rule="must be sbatch", fix="use --render sbatch")


def _show(
    submissions: Sequence[Submission], *, dry_run: bool, render: str | None, tflops: float | None
) -> None:
    """Print previews or, with ``render``, scripts; write the scripts unless ``dry_run`` is set."""
    from launchers.batch_job import write_job
    from launchers.preview import show
    from launchers.sbatch import render as render_script

    if tflops is not None and not math.isfinite(tflops):  # typer's min= lets inf pass
        raise InputError(
            f"--assumed-tflops {tflops}", rule="must be a finite number", fix="use for example 400"
        )
    commands = []
    for submission in submissions:
        job = submission.job
        local = job.profile.executor == "local"
        if render and local:
            raise InputError(
                "--render sbatch", rule="is for Slurm", fix="name a Slurm profile with --profile"
            )
        if not render:
            problems = [f"Would be refused now: {problem}" for problem in submission.problems]
            show(
                job,
                None if local else render_script(job),
                tflops=tflops,
                notes=[*submission.package.notes, *problems],
            )
            continue
        # Standard output has scripts alone, so that it can be redirected into a file.
        for problem in submission.problems:
            sys.stderr.write(f"would be refused now: {problem}\n")
        if not dry_run:
            submission.write_code()
            script = shlex.quote(str(write_job(job)))
            command = f"sbatch {script}"
            # The job number of the stage before is known only once it is submitted.
            if submission.after:
                command = (
                    f"sbatch --dependency=afterok:JOB --kill-on-invalid-dep=yes {script}"
                    f"  # JOB is the number of {submission.after[0]}"
                )
            commands.append(command)
        sys.stdout.write(render_script(job))
    for command in commands:
        sys.stderr.write(f"written; submit it with: {command}\n")
    if any(submission.problems for submission in submissions):
        # As `doctor`: all reasons are shown above.
        raise typer.Exit(2)


def _submit(title: str, submissions: Sequence[Submission]) -> list[str]:
    """Submit jobs through NeMo-Run; return their job numbers."""
    from launchers import slurm
    from launchers.launch_record import read_launches
    from launchers.preview import warnings
    from launchers.status import require_idle
    from launchers.submission import require_nemo_run

    slurm.require()
    require_nemo_run()
    for submission in submissions:
        require_idle(submission.job.folder)
    # After the checks, because this import takes seconds.
    from launchers import nemo

    lines = [
        line
        for submission in submissions
        for line in (*submission.package.notes, *warnings(submission.job))
    ]
    for line in dict.fromkeys(lines):  # stages of a chain have most lines in common
        print_line(line)
    # Written only after the checks of all jobs, so that a refusal leaves nothing behind.
    for submission in submissions:
        submission.write_code()
    nemo.submit(title, submissions)
    job_ids = []
    for submission in submissions:
        job = submission.job
        launch = read_launches(job.folder)[-1]
        job_ids.append(launch.job_id)
        tasks = f", {launch.tasks} tasks" if launch.tasks else ""
        waits = f", after {', '.join(submission.after)}" if submission.after else ""
        print_line(f"job {launch.job_id}{tasks}{waits}: {job.name} in {job.folder}")
    print_line(
        f"`mellum2 launch status {job_ids[0]}`, `logs` and `cancel` take the number or the folder"
    )
    return job_ids


def _follow(folder: Path, job_id: str, rank: int | None) -> int:
    """Show a rank's log until the job has ended; return 0 if it succeeded, else 1."""
    from launchers.status import follow, has_ended, job_status, rank_log

    for line in follow(lambda: rank_log(folder, job_id, rank), lambda: has_ended(job_id)):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    statuses = job_status(folder, job_id)
    _print_statuses(statuses)
    return 0 if all(status.state == "COMPLETED" for status in statuses) else 1


def _from_here(folder: Path) -> str:
    """Return a path from the current folder on, if it lies in it."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _print_statuses(statuses: Sequence[Status]) -> None:
    table = plain_table()
    for column in ("job", "state", "step", "starts", "elapsed", "nodes", "run"):
        table.add_column(
            column,
            no_wrap=column != "run",
            overflow="fold",  # whole: the end of the path tells stages apart
            justify="right" if column in ("step", "starts") else "left",
        )
    for status in statuses:
        table.add_row(
            status.job_id,
            status.state,
            "-" if status.step is None else str(status.step),
            str(status.attempts),
            status.elapsed or "-",
            status.nodes or "-",
            "-" if status.folder is None else _from_here(status.folder),
        )
    console.print(table)
    # Below the table, because a reason is a sentence and would not fit a column.
    for status in statuses:
        if status.reason:
            print_line(f"{status.job_id}: {status.reason}")
