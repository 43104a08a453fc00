"""`mellum2 train`: resolve a run, check it, then start its ranks on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from conversion.exportable import require_exportable_run
from launchers.local import run_local
from launchers.weights import imports_folder, plan_weights, without_load
from mellum2_megatron.checkpoint import (
    StartingPoint,
    check_run_folder,
    output_folder,
    read_run,
    write_run_folder,
)
from mellum2_megatron.checkpoint.folder import RUN_FILE, how_to_resume
from mellum2_megatron.common.console import print_line
from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.config import Run, to_yaml
from mellum2_megatron.data.feed.entries import is_absent
from mellum2_megatron.faults.stop_request import STOPPED
from mellum2_megatron.planning.resolve import default_nproc, plan, resolve_device, resolve_run
from mellum2_megatron.planning.resume import is_done, resume_lines
from mellum2_megatron.planning.rules import enforce
from mellum2_megatron.planning.stage_chain import check_predecessor, check_start
from mellum2_megatron.planning.start_notes import start_notes
from mellum2_megatron.upstream import megatron_arguments
from mellum2_megatron.upstream.parser_check import require_parsed


def start_local(
    name: str,
    overrides: Sequence[str],
    *,
    nproc: int | None,
    device: str,
    output: Path | None,
    dry_run: bool,
    verbose: bool,
) -> int:
    """Resolve, check and train a run on this machine.

    Args:
        name: see `planning.resolve.named_run`.
        overrides: `key=value` words.
        nproc: number of ranks; None: one per GPU, or on a CPU the fewest that the layout allows.
        device: "auto", "cpu" or "cuda".
        output: run folder, default the run's own, else `runs/NAME`.
        dry_run: only print the resolved run and Megatron's arguments.
        verbose: keep Megatron's own output.

    Returns:
        0, or 75 after SIGTERM or SIGUSR1 and a save, or 128 + signal number after an interrupt.

    Raises:
        InputError: a run that cannot work, found before any rank starts.
        WorkError: the ranks failed.
    """
    run = resolve_run(name, overrides, output=output)
    run, weights = plan_weights(run, imports_folder(output_folder(run)))
    if dry_run:
        # machine=False: the run may be meant for another machine, with GPUs.
        planned_device, ranks = plan(run, device, nproc)
        enforce(run, world_size=ranks, device=planned_device, machine=False)
        require_parsed(run)
        data_is_given = any(word.startswith("data.") for word in overrides)
        notes = _data_notes(run, [name, *overrides], data_is_given=data_is_given)
        notes += start_notes(run, ranks)
        # An import that is still to be made has been checked by `plan_weights`.
        if weights is None or weights.done:
            fault = check_start(run, overrides)
            notes += [] if fault is None else [fault]
        sys.stdout.write(to_yaml(run))
        words = shlex.join(megatron_arguments(run, world_size=ranks, device=planned_device))
        sys.stdout.write("".join(f"# {note}\n" for note in notes))
        sys.stdout.write(f"# {ranks} {planned_device} rank(s); Megatron-LM arguments:\n# {words}\n")
        if weights is not None:
            sys.stdout.write(f"# {weights.line()}\n")
        return 0
    resolved_device = resolve_device(device)
    ranks = nproc or default_nproc(run, resolved_device)
    if weights is not None:
        # All else is checked before an import, which takes minutes.
        anew = without_load(run)
        start = StartingPoint.of(anew)
        enforce(anew, world_size=ranks, device=resolved_device, start=start)
        require_parsed(run)
        check_run_folder(anew, start)
        weights.run()
    start = StartingPoint.of(run)
    enforce(run, world_size=ranks, device=resolved_device, start=start)
    require_parsed(run)
    run = start.joined(run)
    check_predecessor(run, start)
    check_run_folder(run, start)
    if is_done(run, start):
        sys.stdout.writelines(f"{line}\n" for line in resume_lines(run, start))
        report_end(output_folder(run))
        return 0
    notes = [*_data_notes(run, [name, *overrides]), *start_notes(run, ranks)]
    _check_engine(run)
    sys.stderr.write("".join(f"{note}\n" for note in notes))
    write_run_folder(run)
    code = run_local(
        output_folder(run) / RUN_FILE, nproc=ranks, device=resolved_device, verbose=verbose
    )
    if code == STOPPED:
        sys.stderr.write("stopped as asked, all is saved; the same command resumes from here\n")
    elif code:
        sys.stderr.write(f"interrupted; {how_to_resume(output_folder(run))}\n")
    else:
        report_end(output_folder(run))
    return code


def report_end(folder: Path) -> None:
    """Draw the loss curve of a finished run; print its last losses and the commands that follow."""
    # Here, because planning a run, which shares this module, loads no NumPy.
    from mellum2_megatron.checkpoint.run_list import RunOnDisk, read_curves
    from mellum2_megatron.metrics import plot_loss
    from mellum2_megatron.metrics.plots import LOSS_CURVE

    done = RunOnDisk.of(folder)
    losses = [
        f"{name} loss {loss:.3f}"
        for name, loss in (("training", done.loss), ("validation", done.valid_loss))
        if loss is not None
    ]
    print_line(f"{folder}: {done.step} steps" + "".join(f", {loss}" for loss in losses))
    try:
        curves = read_curves(folder)
        plot_loss(curves.records, folder / LOSS_CURVE, title=curves.name, recipe=curves.recipe)
        print_line(f"loss curve: {folder / LOSS_CURVE}")
    except (InputError, OSError) as error:
        # The training is saved; a picture must not make it fail.
        print_line(f"no loss curve: {first_line(error)}")
    try:
        require_exportable_run(read_run(folder / RUN_FILE, warn=False))
    except InputError as error:
        print_line(f"no export to Hugging Face: {error.value}: {error.rule}")
    else:
        print_line(
            shlex.join(
                [
                    *("mellum2", "convert", "export", "--megatron-path", str(folder)),
                    *("--hf-path", str(folder / "hf")),
                ]
            )
            + "   # next: to Hugging Face"
        )
    print_line(
        shlex.join(["mellum2", "plot", str(folder)]) + " --metric grad_norm   # other curves"
    )


def _data_notes(run: Run, words: Sequence[str], *, data_is_given: bool = True) -> list[str]:
    """Check the data and return what is worth saying about them, one line each.

    Args:
        run: a resolved run.
        words: words of the command line that name it.
        data_is_given: false if the command names no data. A recipe's own folder may then be absent,
            because a dry run may be meant for another machine.

    Raises:
        InputError: see `check_data`.
    """
    if not data_is_given and is_absent(run.data):
        return [f"data: not checked, {run.data.path} is not on this machine"]
    # Imports numpy, which a dry run of another machine's data does not need.
    from mellum2_megatron.data.feed.index_plan import index_command, index_notes
    from mellum2_megatron.data.feed.sources import check_amounts, check_data

    data = check_data(run)
    if run.data.feed == "rollouts":
        return _task_notes(run)
    return [*data.notes, *check_amounts(run, data), *index_notes(run, data, index_command(words))]


def _check_engine(run: Run) -> None:
    """Refuse a server of answers that is not there.

    Raises:
        InputError: see above.
    """
    if run.data.feed != "rollouts" or run.rl.url is None:
        return
    from mellum2_megatron.serving.client import VllmClient

    if not VllmClient(run.rl.url, None, timeout=60.0).is_up():
        raise InputError(
            f"rl.url={run.rl.url}",
            rule="no server answers there",
            fix="start `mellum2 serve FOLDER --reloadable` and wait until it has read its model",
        )


def _task_notes(run: Run) -> list[str]:
    """Read the tasks of a run that learns from its own answers; return what is worth saying.

    Raises:
        InputError: see `run_tasks`; or a task runs programs and there is no sandbox.
    """
    from mellum2_megatron.rlvr.rewards.sandbox import find_sandbox
    from mellum2_megatron.rollouts.prompts import run_tasks

    tasks = run_tasks(run)
    runs_programs = any(task.runs_programs for task in (*tasks.train, *tasks.valid))
    sandbox = [f"programs run in {find_sandbox().description}"] if runs_programs else []
    longest = max(map(len, tasks.train_tokens))
    return [
        f"tasks: {len(tasks.train):,} to learn from, {len(tasks.valid):,} to validate with, "
        f"prompts of up to {longest:,} tokens",
        *sandbox,
        *(f"warning: {line}" for line in tasks.warnings),
    ]
