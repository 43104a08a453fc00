"""Start a run's ranks on this machine and watch them; report one error for all."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from launchers.meeting_store import Rendezvous, meeting_store
from launchers.streaming import streaming
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.common.console import console
from mellum2_megatron.common.files import write_text
from mellum2_megatron.common.provenance import record
from mellum2_megatron.config import Device
from mellum2_megatron.faults.failures import RankFailure, only_complete_checkpoints, root_cause
from mellum2_megatron.faults.stop_request import STOP_SIGNALS, STOPPED, is_stop

FAILURE_FILE = "failure.txt"
"""File in the run folder: traceback of an unexplained failure that ended the run."""

_POLL = 0.1
"""Seconds between two looks at the ranks."""

_INTERRUPTS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that end the ranks.

SIGTERM is not one: it is passed on to them (`STOP_SIGNALS`), and they save first.
"""


def rank_command(run_file: Path, *, device: Device, verbose: bool = False) -> list[str]:
    """Return the command of every rank; its number is in the environment."""
    command = [
        sys.executable,
        "-m",
        "mellum2_megatron.training",
        str(run_file),
        "--device",
        device,
        "--to-launcher",
    ]
    return [*command, "--verbose"] if verbose else command


def rank_environment(nproc: int, device: Device) -> dict[str, str]:
    """Return environment variables for ``nproc`` local ranks.

    TORCH_CPP_LOG_LEVEL and OMP_NUM_THREADS keep a value that is already set in this process.
    """
    environment = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    # More threads than a rank's share of the cores make all ranks slower.
    cores = len(os.sched_getaffinity(0))
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    if device == "cpu":
        # Megatron would use any GPU that torch can see.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def few_cores(nproc: int) -> str:
    """Return a warning if the ranks have fewer cores than there are ranks; else an empty text.

    Since Slurm 22.05 a step that asks for no number of cores may be bound to one.
    """
    cores = len(os.sched_getaffinity(0))
    if cores >= nproc:
        return ""
    shown = f"{cores} core{'s' * (cores != 1)}"
    return f"{nproc} ranks share {shown}: set cpus_per_task of the profile to a node's cores"


def run_local(run_file: Path, *, nproc: int, device: Device, verbose: bool = False) -> int:
    """Train a resolved run on ``nproc`` local ranks and wait for them.

    An interrupt ends the ranks. After SIGTERM or SIGUSR1 they finish their step and save.
    Half-written checkpoints are removed in any case.

    Returns:
        0, or `STOPPED` (75) after such a save, or 128 + signal number after an interrupt.

    Raises:
        InputError, WorkError: the ranks failed; one message for all. An unexplained failure has its
            traceback in `FAILURE_FILE` beside the run file.
    """
    folder = run_file.parent
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    command = rank_command(run_file, device=device, verbose=verbose)
    with (
        only_complete_checkpoints(folder),
        streaming(read_run(run_file), folder) as stream,
        temporary_environment({**rank_environment(nproc, device), **stream}),
    ):
        outcome = run_ranks(command, nproc=nproc, verbose=verbose)
    # A rank killed in the middle of a progress bar leaves the cursor hidden.
    console.show_cursor()
    if isinstance(outcome, int):
        return outcome
    # Here, not in a rank: the first rank is killed when another one fails.
    with suppress(OSError):
        record(folder, event="end", world_size=nproc, more={"outcome": "failed"})
    cause = root_cause(outcome)
    file = None
    if cause.kind != "explained":
        file = save_traceback(cause.traceback, folder / FAILURE_FILE)
    raise cause.error(file, folder)


def run_ranks(
    command: Sequence[str],
    *,
    nproc: int,
    rendezvous: Rendezvous | None = None,
    verbose: bool = False,
    received: list[int] | None = None,
) -> int | list[RankFailure]:
    """Run a command once per rank, and end all ranks of this machine when one fails.

    The ranks get torch's usual environment (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` ...). On one
    machine nothing listens on another address than loopback.

    Args:
        command: command of every rank.
        nproc: ranks on this machine.
        rendezvous: meeting place of the nodes; None, the default, on a single machine.
        verbose: keep torch's own messages about failures, default False.
        received: stop signals received before the call, default none; later ones are appended.

    Returns:
        0, or `STOPPED`, or 128 + signal number after an interrupt, or the failures of the ranks.

    Raises:
        WorkError: the other nodes do not arrive in time.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    stop_signals = [] if received is None else received

    def pass_on(number: int, frame: FrameType | None) -> None:
        stop_signals.append(number)
        # The keeper of a stream, a child too, ignores it.
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    with tempfile.TemporaryDirectory(prefix="mellum2-ranks-") as logs:
        handlers = {number: signal.getsignal(number) for number in (*_INTERRUPTS, *STOP_SIGNALS)}
        log_level = logging.root.manager.disable
        for number in STOP_SIGNALS:
            signal.signal(number, pass_on)
        if not verbose:
            # torch logs each failure itself, with the signals it sends and exit codes.
            logging.disable(logging.CRITICAL)
        try:
            if stop_signals:
                return STOPPED
            failures = _start_and_watch(command, nproc, rendezvous, logs)
            if not failures:
                return 0
            stopped = is_stop(
                (failure.exit_code for failure in failures), signalled=bool(stop_signals)
            )
            return STOPPED if stopped else failures
        except SignalException as error:
            return 128 + int(error.sigval)
        finally:
            logging.disable(log_level)
            # torch does not restore the handlers that it replaces.
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _start_and_watch(
    command: Sequence[str], nproc: int, rendezvous: Rendezvous | None, logs: str
) -> list[RankFailure]:
    """Start the ranks and wait until all have ended or one has failed; return the failures."""
    from torch.distributed.elastic.multiprocessing import (
        DefaultLogsSpecs,
        SignalException,
        start_processes,
    )

    node = 0 if rendezvous is None else rendezvous.node
    nodes = 1 if rendezvous is None else rendezvous.nodes
    first = node * nproc
    with meeting_store(rendezvous) as meeting:
        common = {
            "WORLD_SIZE": str(nodes * nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            # As torchrun names the node and the start; libraries read them.
            "GROUP_RANK": str(node),
            "GROUP_WORLD_SIZE": str(nodes),
            "TORCHELASTIC_RUN_ID": meeting.name,
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "MASTER_ADDR": meeting.address,
            "MASTER_PORT": str(meeting.port),
            # The store is there already: rank 0 joins it like the others, and hosts none.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get(
                "TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"
            ),
        }
        if rendezvous is None:
            # gloo and NCCL listen on the interface that the host's name stands for, if not told.
            common |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        signals = ",".join(number.name for number in _INTERRUPTS)
        with temporary_environment({"TORCHELASTIC_SIGNALS_TO_HANDLE": signals}):
            ranks = start_processes(
                name="ranks",
                entrypoint=command[0],
                args={local: tuple(command[1:]) for local in range(nproc)},
                envs={
                    local: {**common, "RANK": str(first + local), "LOCAL_RANK": str(local)}
                    for local in range(nproc)
                },
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
        try:
            result = None
            while result is None:
                result = ranks.wait(timeout=60, period=_POLL)
        except SignalException as error:
            ranks.close(death_sig=error.sigval)
            raise
        finally:
            ranks.close()
        if not result.is_failed():
            meeting.leave()
        return [
            RankFailure.of(
                first + local, failure.exitcode, failure.error_file_data, failure.timestamp
            )
            for local, failure in result.failures.items()
        ]


@contextmanager
def temporary_environment(changes: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the ranks to inherit, and restore them at the end."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def save_traceback(traceback: str, file: Path) -> Path | None:
    """Write a traceback and return its file; None if it is empty or cannot be written."""
    if not traceback:
        return None
    with suppress(OSError):  # a full disk must not hide why the run ended
        write_text(file, traceback)
        return file
    return None
