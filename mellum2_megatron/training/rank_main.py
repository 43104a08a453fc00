"""The main of every rank: checks a resolved run and trains it with Megatron's own `pretrain`.

    torchrun --nproc-per-node 2 -m mellum2_megatron.training runs/tiny/run.yaml --device cpu

`mellum2 train` writes the YAML file and starts this; the file alone defines the run.

Nothing that imports torch or Megatron is imported at the top of this module. Our changes to
Megatron (`_activate`) must be in place before it is first imported, and bad input is refused in
less time than torch takes to load.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from mellum2_megatron import upstream
from mellum2_megatron.checkpoint import (
    StartingPoint,
    check_run_folder,
    output_folder,
    write_run_folder,
)
from mellum2_megatron.checkpoint.checks import check_share
from mellum2_megatron.checkpoint.resume_keys import Change
from mellum2_megatron.checkpoint.run_folder import read_run_in_place
from mellum2_megatron.checkpoint.saving import remove_partial_checkpoints
from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.machine_load import MachineLoad, cpu_seconds
from mellum2_megatron.common.provenance import record
from mellum2_megatron.config import Device, Run, overridden
from mellum2_megatron.faults.failures import (
    explained,
    is_echo,
    only_complete_checkpoints,
    report_failure,
)
from mellum2_megatron.faults.hang_watch import HangWatch, default_store
from mellum2_megatron.faults.stop_request import STOPPED, StopRequest
from mellum2_megatron.planning.resume import data_changes, is_done, resume_lines
from mellum2_megatron.planning.rules import enforce

_ECHO_SECONDS = 5.0
"""Seconds to wait before exiting when this rank failed only because another did; the first cause is
then reported first."""


def main(argv: list[str] | None = None) -> int:
    """Train the run of a YAML file in this process, one rank of `WORLD_SIZE`.

    Returns:
        0, or `STOPPED` (75) after a signal and a save. A failure ends the process: 2 for bad input,
        else 1 (`failures.report_failure`).
    """
    parser = argparse.ArgumentParser(
        prog="python -m mellum2_megatron.training", description=main.__doc__
    )
    parser.add_argument("run", type=Path, help="resolved run, as `mellum2 train` writes it")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument(
        "--verbose", action="store_true", help="keep Megatron's own output, and print tracebacks"
    )
    parser.add_argument(
        "--to-launcher",
        action="store_true",
        help="write a failure to the launcher's report file, not to stderr",
    )
    options = parser.parse_args(argv)
    # Ctrl-C must end a rank at once: Python's own handler would wait for the running collective.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        finished = train(
            read_run_in_place(options.run)[0],
            device=options.device,
            verbose=options.verbose,
            to_launcher=options.to_launcher,
        )
        import torch

        # A run that is done already has made none.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if not finished:
            # At once: a later signal of the launcher would replace this exit code.
            _end(STOPPED)
    except SystemExit:
        raise
    # A failed save is no Exception (torch/distributed/checkpoint/api.py, 2.15).
    except BaseException as error:
        code = report_failure(error, to_launcher=options.to_launcher, verbose=options.verbose)
        if is_echo(error):
            time.sleep(_ECHO_SECONDS)
        _end(code)
    return 0


def _end(code: int) -> NoReturn:
    """End this process at once. In sys.exit, threads and process groups may wait for lost ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train(run: Run, *, device: Device, verbose: bool = False, to_launcher: bool = False) -> bool:
    """Train `run` in this process; torchrun's environment names the rank.

    Args:
        run: a resolved run.
        device: "cpu" (activates the CPU backend) or "cuda".
        verbose: keep Megatron's own output.
        to_launcher: see `failures.report_failure`.

    Returns:
        True if the run has ended, False if it was stopped by a signal and has saved.

    Raises:
        InputError: the run cannot work as it is.
        WorkError: it failed on the way.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    start = StartingPoint.of(run)
    enforce(run, world_size=world_size, device=device, start=start)
    run = start.joined(run)
    check_run_folder(run, start)
    check_share(run, start, rank=rank, world_size=world_size)
    os.environ.update(upstream.environment(run))
    kept: list[str] = []
    if device == "cuda":
        kept = upstream.kept_variables(run, os.environ)
        for name, value in upstream.gpu_environment(run).items():
            os.environ.setdefault(name, value)
    _activate(device, verbose=verbose)
    output, stop = output_folder(run), StopRequest()
    stop.listen()

    watch = _hang_watch(run, rank=rank, world_size=world_size, to_launcher=to_launcher)
    changed = (*start.changes(run), *data_changes(run, start))
    # The ranks of a machine are children of one launcher.
    launcher = os.getppid()
    began = cpu_seconds(launcher)
    if rank == 0:
        _begin(run, start, changed, device=device, world_size=world_size)
        sys.stdout.writelines(f"{line}\n" for line in kept)
        sys.stdout.flush()

    def record_end(outcome: str) -> None:
        # A full disk must not turn a finished run into a failure, nor hide why another one failed.
        with suppress(OSError):
            if rank == 0:
                load = MachineLoad.between(began, cpu_seconds(launcher))
                more = {"outcome": outcome, "load": asdict(load)}
                record(output, event="end", world_size=world_size, more=more)

    if is_done(run, start):
        record_end("finished")
        return True
    watch.start()
    with only_complete_checkpoints(output) if rank == 0 else nullcontext(), explained(output):
        from mellum2_megatron.training.loop import run_loop

        try:
            run_loop(
                run,
                start,
                changed,
                world_size=world_size,
                device=device,
                stop=stop,
                watch=watch,
            )
        except SystemExit as end:  # Megatron's way to leave its loop early
            if end.code or not stop.agreed:
                raise
            record_end("stopped")
            return False
        except Exception:
            record_end("failed")
            raise
        finally:
            watch.stop()
        record_end("finished")
    return True


def _hang_watch(run: Run, *, rank: int, world_size: int, to_launcher: bool) -> HangWatch:
    """Return this rank's watch over stuck ranks, which ends this process when it finds one."""

    def end_hung_rank(error: WorkError, is_first: bool) -> None:
        # A launcher picks one of all ranks' reports; without one the first rank reports for all.
        if is_first or to_launcher:
            report_failure(error, to_launcher=to_launcher, verbose=False)
        _end(error.exit_code)

    def current_step() -> int:
        from megatron.training import get_args

        # Megatron counts finished steps.
        return int(get_args().curr_iteration) + 1

    return HangWatch(
        rank=rank,
        world_size=world_size,
        timeout=run.timeout_minutes * 60,
        setup_timeout=run.setup_timeout_minutes * 60,
        end=end_hung_rank,
        step=current_step,
        output=output_folder(run),
        store=default_store,
    )


def _begin(
    run: Run, start: StartingPoint, changed: Sequence[Change], *, device: Device, world_size: int
) -> None:
    """Tidy and fill the run's folder, and print where the run starts. Of rank 0."""
    output = output_folder(run)
    remove_partial_checkpoints(output)
    # Our launchers have written it already. A plain torchrun with a run file has not.
    write_run_folder(run)
    record(
        output,
        event="start",
        world_size=world_size,
        from_step=start.step,
        more={
            "device": device,
            # The file and its hash, if the recipe is in a file of the user's own.
            "recipe": run.sources.get("name", run.name),
            "overrides": overridden(run),
            "changed": {change.key: [change.before, change.after] for change in changed},
            "cwd": os.getcwd(),
        },
    )
    sys.stdout.write(f"{start.line(run)}\n")
    sys.stdout.writelines(f"{line}\n" for line in resume_lines(run, start))


def _activate(device: Device, *, verbose: bool) -> None:
    """Make Megatron importable and runnable on `device`; nothing may have imported it before."""
    if not verbose:
        upstream.quiet_upstream()
    if device == "cpu":
        from mellum2_megatron import cpu

        cpu.activate()
    else:
        upstream.activate()
