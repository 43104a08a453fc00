"""Start a run's ranks on this machine under torch's elastic agent; report one error for all."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from mellum2_megatron.common.console import console
from mellum2_megatron.common.files import write_text
from mellum2_megatron.config import Device
from mellum2_megatron.faults.failures import RankFailure, only_complete_checkpoints, root_cause
from mellum2_megatron.faults.stop_request import STOP_SIGNALS, STOPPED, is_stop

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

FAILURE_FILE = "failure.txt"
"""File in the run folder: traceback of an unexplained failure that ended the run."""

_INTERRUPTS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals on which torch's agent ends the ranks.

torch's default has SIGTERM too. Here SIGTERM is passed on to the ranks (`STOP_SIGNALS`), which save
first.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Meeting place of the nodes of one run.

    Attributes:
        nodes: number of nodes.
        node: number of this node; ranks count up from node 0.
        address, port: address of node 0, reachable from all nodes.
        name: name of this start, the same on all nodes and new for every start.
        timeout: seconds to wait for the other nodes, default 900.
    """

    nodes: int
    node: int
    address: str
    port: int
    name: str
    timeout: int = 900


def rank_command(run_file: Path, *, device: Device, verbose: bool = False) -> list[str]:
    """Return the command of every rank; torch's agent passes the rank in the environment."""
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
    if device == "cpu":
        # More threads than a rank's share of the cores make all ranks slower.
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = os.environ.get(
            "OMP_NUM_THREADS", str(max(1, cores // nproc))
        )
        # Megatron would use any GPU that torch can see.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


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
        temporary_environment(rank_environment(nproc, device)),
    ):
        outcome = run_ranks(command, nproc=nproc, verbose=verbose)
    # A rank killed in the middle of a progress bar leaves the cursor hidden.
    console.show_cursor()
    if isinstance(outcome, int):
        return outcome
    cause = root_cause(outcome)
    file = None
    if cause.kind != "explained":
        file = save_traceback(cause.traceback, folder / FAILURE_FILE)
    raise cause.error(file)


def run_ranks(
    command: Sequence[str],
    *,
    nproc: int,
    rendezvous: Rendezvous | None = None,
    verbose: bool = False,
    received: list[int] | None = None,
) -> int | list[RankFailure]:
    """Run a command once per rank under torch's elastic agent.

    The agent ends all ranks of this machine when one fails.

    Args:
        command: command of every rank.
        nproc: ranks on this machine.
        rendezvous: meeting place of the nodes; None, the default, on a single machine.
        verbose: keep the agent's own messages about failures, default False.
        received: stop signals received before the call, default none; later ones are appended.

    Returns:
        0, or `STOPPED`, or 128 + signal number after an interrupt, or the failures of the ranks.

    Raises:
        RuntimeError: from torch, if the other nodes do not arrive in time.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    stop_signals = [] if received is None else received

    def pass_on(number: int, frame: FrameType | None) -> None:
        stop_signals.append(number)
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    with tempfile.TemporaryDirectory(prefix="mellum2-ranks-") as logs:
        handlers = {number: signal.getsignal(number) for number in (*_INTERRUPTS, *STOP_SIGNALS)}
        log_level = logging.root.manager.disable
        for number in STOP_SIGNALS:
            signal.signal(number, pass_on)
        if not verbose:
            # The agent logs each failure itself, with the signals it sends and exit codes.
            logging.disable(logging.CRITICAL)
        try:
            if stop_signals:
                return STOPPED
            elastic_launch(_launch_config(nproc, rendezvous, logs), command[0])(*command[1:])
        except ChildFailedError as error:
            failures = [
                RankFailure.of(rank, failure.exitcode, failure.error_file_data, failure.timestamp)
                for rank, failure in error.failures.items()
            ]
            stopped = is_stop(
                (failure.exit_code for failure in failures), signalled=bool(stop_signals)
            )
            return STOPPED if stopped else failures
        except SignalException as error:
            return 128 + int(error.sigval)
        finally:
            logging.disable(log_level)
            # The agent does not restore the handlers that it replaces.
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


def _launch_config(nproc: int, rendezvous: Rendezvous | None, logs: str) -> LaunchConfig:
    """Return the agent's configuration; it writes its files into the folder ``logs``."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    if rendezvous is None:
        # As `torchrun --standalone`: a free port keeps runs on the same machine apart.
        meeting: dict[str, Any] = {
            "run_id": str(uuid.uuid4()),
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "rdzv_configs": {},
        }
    else:
        # "static" numbers ranks in the order of the nodes, "c10d" in the order of arrival.
        meeting = {
            "run_id": rendezvous.name,
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{rendezvous.address}:{rendezvous.port}",
            "rdzv_configs": {"rank": rendezvous.node, "timeout": rendezvous.timeout},
        }
    nodes = 1 if rendezvous is None else rendezvous.nodes
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=nproc,
        # `launchers.outcome` decides about restarts, for all nodes at once.
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        signals_to_handle=",".join(number.name for number in _INTERRUPTS),
        **meeting,
    )


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
