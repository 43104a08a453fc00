"""Run the ranks of one node; Slurm starts this once on every node.

    srun --ntasks-per-node=1 python -m launchers.agent runs/x/run.yaml --ranks 8 --device cuda
        --tries 3

Slurm's environment gives the number of this node; ``MASTER_ADDR`` and ``MASTER_PORT`` give the
meeting place of all nodes. The agent restarts nothing: the batch script restarts all nodes together
(`launchers.outcome`).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mellum2_megatron.faults.stop_request import STOP_SIGNALS, STOPPED

if TYPE_CHECKING:
    from mellum2_megatron.faults.failures import RankFailure


def main(argv: Sequence[str] | None = None) -> int:
    """Run this node's ranks of a run and wait for them.

    Returns:
        0; 75 after a stop signal and a save; 2 for bad input; 1 for any other failure.
    """
    # Before the imports below, which take seconds: a stop signal during them must not be lost.
    received: list[int] = []
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, lambda number, _: received.append(number))
    parser = argparse.ArgumentParser(prog="python -m launchers.agent", description=main.__doc__)
    parser.add_argument("run", type=Path, help="resolved run")
    parser.add_argument("--ranks", type=int, required=True, help="ranks on this node")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--tries", type=int, default=3, help="restarts allowed without progress")
    parser.add_argument(
        "--verbose", action="store_true", help="keep Megatron's and torch's own output"
    )
    options = parser.parse_args(argv)

    from launchers.early_end import ended_early
    from launchers.outcome import Report, finish_attempt, write_report

    folder, node = options.run.parent, int(os.environ.get("SLURM_NODEID", "0"))
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    code, failures, message = _train(options, node, received)
    if code == STOPPED and ended_early(folder):
        code = 0  # it is not to be started again
    if message:
        sys.stderr.write(f"error: node {name}: {message}\n")
    if code:
        write_report(
            folder, node, Report(node=name, code=code, failures=tuple(failures), message=message)
        )
    elif node == 0:
        # The batch script calls `launchers.outcome` only after another exit code than 0.
        finish_attempt(folder, code=0, tries=options.tries)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _train(
    options: argparse.Namespace, node: int, received: list[int]
) -> tuple[int, Sequence[RankFailure], str]:
    """Run this node's ranks.

    Returns:
        The node's exit code, its ranks' failures, and one message for all of them; the last two
        are empty after a good end or a stop.
    """
    from launchers.early_end import ended_early, watching_loss
    from launchers.local import (
        FAILURE_FILE,
        few_cores,
        rank_command,
        rank_environment,
        run_ranks,
        save_traceback,
        temporary_environment,
    )
    from launchers.meeting_store import Rendezvous
    from launchers.outcome import start_attempt, this_attempt
    from launchers.streaming import streaming
    from mellum2_megatron.checkpoint import read_run
    from mellum2_megatron.common.errors import InputError, WorkError
    from mellum2_megatron.faults.failures import only_complete_checkpoints, root_cause
    from mellum2_megatron.planning.machine_rules import check_node

    folder, nodes = options.run.parent, int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    rendezvous = None
    if nodes > 1:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = ".".join(map(str, this_attempt()))
        rendezvous = Rendezvous(nodes=nodes, node=node, address=address, port=port, name=attempt)
    # One node keeps the records and the checkpoints: all of them share the run folder.
    refusal = start_attempt(folder, tries=options.tries) if node == 0 else None
    if refusal is not None:
        return 1, (), f"not started: {refusal.message}"
    if ended_early(folder):
        return STOPPED, (), ""
    cleanup = only_complete_checkpoints(folder) if node == 0 else nullcontext()
    try:
        run = read_run(options.run)
        # Before the nodes meet: a node that lacks a package ends at once, in one message.
        check_node(run, world_size=nodes * options.ranks, device=options.device)
        command = rank_command(options.run, device=options.device, verbose=options.verbose)
        environment = rank_environment(options.ranks, options.device)
        warning = few_cores(options.ranks) if options.device == "cuda" else ""
        if warning:
            sys.stderr.write(f"warning: {warning}\n")
            sys.stderr.flush()
        with (
            cleanup,
            streaming(run, folder, rendezvous) as stream,
            temporary_environment({**environment, **stream}),
            watching_loss(folder) if node == 0 else nullcontext(),
        ):
            outcome = run_ranks(
                command,
                nproc=options.ranks,
                rendezvous=rendezvous,
                verbose=options.verbose,
                received=received,
            )
    except InputError as error:
        return error.exit_code, (), str(error)
    except WorkError as error:
        # The nodes did not meet. After a stop signal it is no failure, since the nodes stop one
        # after the other.
        return (STOPPED, (), "") if received else (error.exit_code, (), str(error))
    if isinstance(outcome, int):
        return outcome, (), ""
    cause = root_cause(outcome)
    file = None
    if cause.kind != "explained":
        file = save_traceback(cause.traceback, folder / f"{node}.{FAILURE_FILE}")
    error_shown = cause.error(file, folder)
    return error_shown.exit_code, outcome, str(error_shown)


if __name__ == "__main__":
    sys.exit(main())
