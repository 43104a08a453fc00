"""Start a run's ranks on this machine: torch's elastic agent, one process a rank, and one message
when they fail."""

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
from typing import TYPE_CHECKING

import psutil

from mellum2_megatron.common.console import console
from mellum2_megatron.common.files import write_text
from mellum2_megatron.config import Device
from mellum2_megatron.faults.failures import RankFailure, only_complete_checkpoints, root_cause
from mellum2_megatron.faults.stop_request import STOP_SIGNALS, STOPPED, is_stop

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

FAILURE_FILE = "failure.txt"
"""In the run's folder: the traceback of the rank that ended the run, if it was none that the
message explains."""

_ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals with which torch's agent ends the ranks. SIGTERM, also of its own list, is passed on
(`STOP_SIGNALS`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Where the machines of one run meet.

    Attributes:
        nodes: how many there are.
        node: which one this is; ranks are counted up from node 0 on.
        address, port: of node 0, as all of them reach it.
        name: the same on all of them, and another one for every start.
        timeout: seconds to wait for the others.
    """

    nodes: int
    node: int
    address: str
    port: int
    name: str
    timeout: int = 900


def rank_command(run_file: Path, *, device: Device, verbose: bool = False) -> list[str]:
    """Return the command that every rank runs; torch's agent says in the environment which rank it
    is."""
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
    """Return what local ranks need in their environment, where this process's own does not say
    otherwise."""
    environment = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    if device == "cpu":
        # A rank's share of the cores is what it can use.
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = os.environ.get(
            "OMP_NUM_THREADS", str(max(1, cores // nproc))
        )
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def run_local(run_file: Path, *, nproc: int, device: Device, verbose: bool = False) -> int:
    """Train a resolved run on ``nproc`` local ranks and wait for them.

    An interrupt ends the ranks; SIGTERM and SIGUSR1 let them finish their step and save. Whatever
    ends them early, checkpoints that they had not finished are removed.

    Returns:
        0, or `STOPPED` (75) after such a save, or 128 + the number of the signal that interrupted
        the run.

    Raises:
        InputError, WorkError: one message for all ranks; the traceback of a rank that could not
            explain itself is in `FAILURE_FILE` beside the run file.
    """
    folder = run_file.parent
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    with only_complete_checkpoints(folder), variables(rank_environment(nproc, device)):
        outcome = run_ranks(
            rank_command(run_file, device=device, verbose=verbose), nproc=nproc, verbose=verbose
        )
    console.show_cursor()  # the progress bar of a rank that was killed has left it hidden
    if isinstance(outcome, int):
        return outcome
    cause = root_cause(outcome)
    raise cause.error(
        None if cause.kind == "explained" else keep(cause.traceback, folder / FAILURE_FILE)
    )


def run_ranks(
    command: Sequence[str],
    *,
    nproc: int,
    rendezvous: Rendezvous | None = None,
    verbose: bool = False,
    came: list[int] | None = None,
) -> int | list[RankFailure]:
    """Run a command once a rank under torch's elastic agent, which ends all ranks of this machine
    when one fails.

    Args:
        command: of every rank.
        nproc: ranks of this machine.
        rendezvous: where to meet the other machines of the run; None if there are none.
        verbose: keep what the agent says of failures.
        came: stop signals that came before; those that come now are added.

    Returns:
        0, or `STOPPED`, or 128 + the number of the signal that interrupted this process, or how the
        ranks failed.

    Raises:
        RuntimeError: of torch, the other machines were not there in time.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    with (
        tempfile.TemporaryDirectory(prefix="mellum2-ranks-") as logs,
        _quiet_agent(quiet=not verbose),
    ):
        handlers = {each: signal.getsignal(each) for each in (*_ENDING, *STOP_SIGNALS)}
        passed_on = _pass_on(STOP_SIGNALS, [] if came is None else came)
        try:
            if passed_on:
                return STOPPED
            elastic_launch(_launch_config(nproc, rendezvous, logs), command[0])(*command[1:])
        except ChildFailedError as error:
            failures = [
                RankFailure.of(rank, failure.exitcode, failure.error_file_data, failure.timestamp)
                for rank, failure in error.failures.items()
            ]
            stopped = is_stop((failure.exit_code for failure in failures), told=bool(passed_on))
            return STOPPED if stopped else failures
        except SignalException as error:
            return 128 + int(error.sigval)
        finally:
            for each, handler in handlers.items():  # the agent leaves its own behind
                signal.signal(each, handler)
    return 0


def _launch_config(nproc: int, rendezvous: Rendezvous | None, logs: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    # One machine: as `torchrun --standalone`, a free port, so that its runs do not meet. Several:
    # static, so that ranks follow the order of the nodes; who comes first would decide otherwise.
    nodes = 1 if rendezvous is None else rendezvous.nodes
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=nproc,
        run_id=str(uuid.uuid4()) if rendezvous is None else rendezvous.name,
        rdzv_backend="c10d" if rendezvous is None else "static",
        rdzv_endpoint="localhost:0"
        if rendezvous is None
        else f"{rendezvous.address}:{rendezvous.port}",
        rdzv_configs={}
        if rendezvous is None
        else {"rank": rendezvous.node, "timeout": rendezvous.timeout},
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        signals_to_handle=",".join(each.name for each in _ENDING),
    )


def _pass_on(signals: Sequence[signal.Signals], came: list[int]) -> list[int]:
    """Hand these signals to the ranks from now on; return the list of those that came, which
    grows."""

    def hand(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    for each in signals:
        signal.signal(each, hand)
    return came


@contextmanager
def variables(changes: dict[str, str]) -> Iterator[None]:
    """Set variables of this process, which the agent passes on."""
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


@contextmanager
def _quiet_agent(*, quiet: bool) -> Iterator[None]:
    """Keep the agent's own account of a failure (signals it sends, exit codes) off the terminal."""
    before = logging.root.manager.disable
    if quiet:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def keep(traceback: str, file: Path) -> Path | None:
    if not traceback:
        return None
    with suppress(OSError):  # a full disk must not hide why the run ended
        write_text(file, traceback)
        return file
    return None
