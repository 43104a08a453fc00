"""What Slurm starts once on every node: the node's ranks, under torch's elastic agent.

    srun --ntasks-per-node=1 python -m launchers.agent RUN.yaml --ranks 8 --device cuda --tries 3

Slurm's environment says which node this is; ``MASTER_ADDR`` and ``MASTER_PORT`` say where all of
them meet. Nothing is started again here: the batch script decides that, for all nodes
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
        0; 75 after a stop signal and a save; 2 for bad input, 1 for a failure at work.
    """
    came: list[int] = []
    for each in (
        STOP_SIGNALS
    ):  # before what takes seconds to import: a signal that comes meanwhile is not lost
        signal.signal(each, lambda number, _: came.append(number))
    parser = argparse.ArgumentParser(prog="python -m launchers.agent", description=main.__doc__)
    parser.add_argument("run", type=Path, help="resolved run")
    parser.add_argument("--ranks", type=int, required=True, help="of this node")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument(
        "--tries", type=int, default=3, help="how often a job is started again without a new step"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="keep Megatron's and torch's own output"
    )
    options = parser.parse_args(argv)

    from launchers.outcome import Report, end, write_report

    folder, node = options.run.parent, int(os.environ.get("SLURM_NODEID", "0"))
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    code, failures, message = _train(options, node, came)
    if message:
        sys.stderr.write(f"error: node {name}: {message}\n")
    if code:
        write_report(
            folder, node, Report(node=name, code=code, failures=tuple(failures), message=message)
        )
    elif node == 0:
        end(folder, code=0, tries=options.tries)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _train(
    options: argparse.Namespace, node: int, came: list[int]
) -> tuple[int, Sequence[RankFailure], str]:
    """Return the node's exit code, how its ranks failed, and one message for all of them."""
    from launchers.local import (
        FAILURE_FILE,
        Rendezvous,
        keep,
        rank_command,
        rank_environment,
        run_ranks,
        variables,
    )
    from launchers.outcome import begin, this_attempt
    from mellum2_megatron.checkpoint import read_run
    from mellum2_megatron.common.errors import InputError
    from mellum2_megatron.faults.failures import only_complete_checkpoints, root_cause

    folder, nodes = options.run.parent, int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    rendezvous = None
    if nodes > 1:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = ".".join(map(str, this_attempt()))
        rendezvous = Rendezvous(nodes=nodes, node=node, address=address, port=port, name=attempt)
    refusal = begin(folder, tries=options.tries) if node == 0 else None
    if refusal is not None:
        return 1, (), f"not started: {refusal.message}"
    try:
        read_run(options.run)
        command = rank_command(options.run, device=options.device, verbose=options.verbose)
        whole = only_complete_checkpoints(folder) if node == 0 else nullcontext()
        with whole, variables(rank_environment(options.ranks, options.device)):
            outcome = run_ranks(
                command,
                nproc=options.ranks,
                rendezvous=rendezvous,
                verbose=options.verbose,
                came=came,
            )
    except InputError as error:
        return error.exit_code, (), str(error)
    except (
        RuntimeError
    ) as error:  # of torch's store: another node did not come, or the port is taken
        if came:
            return STOPPED, (), ""
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return 1, (), f"the {nodes} nodes did not meet at {where} ({str(error).splitlines()[0]})"
    if isinstance(outcome, int):
        return outcome, (), ""
    cause = root_cause(outcome)
    file = (
        None
        if cause.kind == "explained"
        else keep(cause.traceback, folder / f"{node}.{FAILURE_FILE}")
    )
    shown = cause.error(file)
    return shown.exit_code, outcome, str(shown)


if __name__ == "__main__":
    sys.exit(main())
