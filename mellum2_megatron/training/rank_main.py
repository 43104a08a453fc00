"""The main of every rank: a resolved run becomes Megatron's own `pretrain`.

    torchrun --nproc-per-node 2 -m mellum2_megatron.training runs/tiny/run.yaml --device cpu

`mellum2 train` checks the run, writes the file and starts this; the file is the whole truth of the
run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from mellum2_megatron.checkpoint import check_run_folder, output_folder, read_run, write_run_folder
from mellum2_megatron.checkpoint.folder import resume_folder, tracked_iteration
from mellum2_megatron.checkpoint.run_folder import check_share
from mellum2_megatron.checkpoint.saving import remove_fragments
from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.provenance import record
from mellum2_megatron.config import Device, Run
from mellum2_megatron.faults.failures import (
    explained,
    is_echo,
    only_complete_checkpoints,
    report_failure,
)
from mellum2_megatron.faults.hang_watch import Watch, default_store
from mellum2_megatron.faults.stop_request import STOPPED, StopRequest
from mellum2_megatron.planning.rules import enforce
from mellum2_megatron.training.datasets import dataset_provider
from mellum2_megatron.training.step import forward_step
from mellum2_megatron.upstream import environment, megatron_arguments

_ECHO_SECONDS = 5.0
"""A rank that failed because of another one waits so long, so that the other's reason is the one
that is reported."""


def main(argv: list[str] | None = None) -> int:
    """Train the run of a YAML file in this process, one rank of `WORLD_SIZE`.

    Returns:
        0, or `STOPPED` (75) after a signal and a save. A failure ends the process: 2 for bad input,
        1 at work (`failures.report_failure` says which).
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
        help="leave what ended this rank to the launcher to tell",
    )
    options = parser.parse_args(argv)
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # an interrupt ends a rank at once, even inside a collective
    try:
        done = train(
            read_run(options.run),
            device=options.device,
            verbose=options.verbose,
            to_launcher=options.to_launcher,
        )
        import torch

        torch.distributed.destroy_process_group()
        if not done:
            _end(
                STOPPED
            )  # at once: a signal that the launcher still sends would be taken for the reason
    except SystemExit:
        raise
    except (
        BaseException
    ) as error:  # a failed save is no Exception (torch/distributed/checkpoint/api.py, 2.15)
        code = report_failure(error, to_launcher=options.to_launcher, verbose=options.verbose)
        if is_echo(error):
            time.sleep(_ECHO_SECONDS)
        _end(code)
    return 0


def _end(code: int) -> NoReturn:
    """End this process; not by sys.exit, since at exit threads and process groups may wait for
    ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train(run: Run, *, device: Device, verbose: bool = False, to_launcher: bool = False) -> bool:
    """Train `run` in this process; torchrun's environment says which rank it is.

    Args:
        run: a resolved run.
        device: what to compute on; "cpu" activates the CPU backend.
        verbose: let Megatron print what it prints.
        to_launcher: see `failures.report_failure`.

    Returns:
        Whether the run has ended; False if it was told to stop, and has saved what there is.

    Raises:
        InputError: the run cannot work as it is.
        WorkError: it failed on the way.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    enforce(run, world_size=world_size, device=device)
    check_run_folder(run)
    check_share(run, rank=rank, world_size=world_size)
    os.environ.update(environment(run))
    _activate(device, verbose)
    output, stop = output_folder(run), StopRequest()
    stop.listen()
    watch = _watch(run, rank, world_size, to_launcher=to_launcher)
    if rank == 0:
        remove_fragments(output)
        write_run_folder(run)
        resumed = tracked_iteration(Path(resume_folder(str(output), run.checkpoint.continue_from)))
        record(
            output, event="start", world_size=world_size, from_step=resumed, more={"device": device}
        )
    with only_complete_checkpoints(output) if rank == 0 else nullcontext(), explained(output):
        try:
            _pretrain(run, world_size, device, stop, watch)
        except (
            SystemExit
        ) as end:  # the way in which Megatron leaves its loop early (training.py:4155)
            if end.code or not stop.agreed:
                raise
            return False
        finally:
            watch.stop()
    return True


def _watch(run: Run, rank: int, world_size: int, *, to_launcher: bool) -> Watch:
    def end(error: WorkError, first: bool) -> None:
        if first or to_launcher:
            report_failure(error, to_launcher=to_launcher, verbose=False)
        _end(error.exit_code)

    def step() -> int:
        from megatron.training import get_args

        return int(get_args().curr_iteration) + 1

    timeout = run.timeout_minutes * 60
    return Watch(
        rank=rank, world_size=world_size, timeout=timeout, end=end, step=step, store=default_store
    )


def _activate(device: Device, verbose: bool) -> None:
    """Make Megatron importable and runnable on `device`; before this nothing of it may be
    imported."""
    from mellum2_megatron import upstream

    if not verbose:
        upstream.quiet_upstream()
    if device == "cpu":
        from mellum2_megatron import cpu

        cpu.activate()
    else:
        upstream.activate()


def _pretrain(run: Run, world_size: int, device: Device, stop: StopRequest, watch: Watch) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from mellum2_megatron.checkpoint import saving
    from mellum2_megatron.faults.step_guard import StepGuard
    from mellum2_megatron.model.provider import run_model_provider
    from mellum2_megatron.training.metrics import TrainingMetrics

    backend = run.resolved_backend(device)
    words = megatron_arguments(run, world_size=world_size, device=device, backend=backend)
    sys.argv = [
        sys.argv[0],
        *words,
    ]  # Megatron has no other way in (megatron/training/arguments.py:parse_args)
    container = pretrain_cfg_container_from_args(parse_and_validate_args())
    metrics = TrainingMetrics(run)
    guard = StepGuard(run.stability, metrics.event)
    saving.install(run.checkpoint, watch.paused, also=guard.save)

    def loaded() -> None:
        metrics.start()
        guard.install(output_folder(run))
        stop.attach()

    try:
        pretrain(
            container,
            dataset_provider(run, loaded),
            ModelType.encoder_or_decoder,
            watch.beating(guard.watching(forward_step)),
            # Not through the container: in 0.19.2 that path never lays parameters out for
            # layer-wise Muon (megatron/training/training.py:2040-2061), which then runs without
            # sharding its state.
            model_provider=metrics.watching(run_model_provider(run, backend)),
        )
    finally:
        metrics.close()
