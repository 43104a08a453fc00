"""Run one function in several processes that form a gloo world, quickly and without a TCP port.

The processes are forked from a server that has activated the CPU backend and imported Megatron:
about 13 s of imports, paid once. Each child initialises torch.distributed through a file store,
redirects its output into a file, and pickles the function's result into another.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, MutableMapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_VISIBLE, _HIDDEN = "CUDA_VISIBLE_DEVICES", "MELLUM2_TESTS_HIDDEN_GPUS"
_ALL = "all"
"""Value for a machine whose GPUs were visible without the variable."""

_SHOWN_OUTPUT = 6000  # characters of each rank's output in a failure message


def hide_gpus(environment: MutableMapping[str, str]) -> None:
    """Hide the machine's GPUs, as all tests need but those whose ranks run on NCCL.

    The CPU backend refuses to work beside a GPU. So the same tests run on every machine.
    """
    environment.setdefault(_HIDDEN, environment.get(_VISIBLE, _ALL))
    environment[_VISIBLE] = ""


def show_gpus(environment: MutableMapping[str, str]) -> None:
    """Undo `hide_gpus`."""
    hidden = environment.pop(_HIDDEN, None)
    if hidden == _ALL:
        environment.pop(_VISIBLE, None)
    elif hidden is not None:
        environment[_VISIBLE] = hidden


@functools.cache
def gpu_count() -> int:
    """Return the number of GPUs for ranks on NCCL; asked in a process that sees them."""
    environment = dict(os.environ)
    show_gpus(environment)
    program = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


class DistributedError(AssertionError):
    """A rank failed, died or did not finish; the message shows the end of every rank's output."""


def run_distributed(
    function: str,
    nproc: int,
    *args: Any,
    timeout: float = 120.0,
    environment: dict[str, str] | None = None,
    backend: str = "gloo",
    **kwargs: Any,
) -> list[Any]:
    """Call ``function`` in ``nproc`` processes of one world and return their results, by rank.

    Args:
        function: ``module:name``, importable from the repository root. Called as ``function(*args,
            **kwargs)``, after ``torch.distributed`` is initialised; ``RANK``, ``WORLD_SIZE`` and
            ``LOCAL_RANK`` are set.
        nproc: number of processes.
        args, kwargs: arguments of ``function``; they are pickled.
        timeout: seconds until all processes are killed, default 120.
        environment: variables added to the children's environment.
        backend: ``gloo``, or ``nccl`` for fresh processes with one GPU each, without the CPU
            backend.

    Raises:
        DistributedError: a child raised, died, or was still running after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="mellum2-world-") as folder:
        world = start_distributed(
            function,
            nproc,
            *args,
            folder=Path(folder),
            environment=environment,
            backend=backend,
            **kwargs,
        )
        return world.results(timeout=timeout)


def start_distributed(
    function: str,
    nproc: int,
    *args: Any,
    folder: Path,
    environment: dict[str, str] | None = None,
    backend: str = "gloo",
    **kwargs: Any,
) -> World:
    """Start the processes and return at once, for tests that kill or signal ranks."""
    context: Any = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
    if backend == "gloo":
        # Only the first call starts the server; the preload of later calls is ignored.
        context.set_forkserver_preload([f"{__name__}_preload"])
    job = (function, args, kwargs, nproc, str(folder), environment or {}, backend)
    processes = [context.Process(target=_child, args=(rank, *job)) for rank in range(nproc)]
    for process in processes:
        process.start()
    return World(processes, folder)


class World:
    """The processes of one run.

    Attributes:
        processes: by rank; tests kill or signal ``processes[rank].pid``.
        folder: folder of the store, and of every rank's output and result.
    """

    def __init__(self, processes: Sequence[ForkServerProcess], folder: Path) -> None:
        self.processes, self.folder = processes, folder

    def results(self, *, timeout: float) -> list[Any]:
        """Wait for all ranks and return their results, by rank.

        Raises:
            DistributedError: a rank failed, died, or was still running after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode not in (None, 0) for process in self.processes):
                # The others may wait in a collective for the failed rank. They get 2 s, in which
                # a rank with a failure of its own can still write it down.
                deadline = min(deadline, time.monotonic() + 2)
                for process in self.processes:
                    process.join(max(0.0, deadline - time.monotonic()))
                break
            if time.monotonic() > deadline:
                break
            self.processes[-1].join(0.02)
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        codes = [process.exitcode for process in self.processes]
        if late or any(codes):
            raise DistributedError(
                f"exit codes {codes}, still running: {late or 'none'}\n{self.output()}"
            )
        return [
            pickle.loads(self._file(rank, "result").read_bytes())
            for rank in range(len(self.processes))
        ]

    def kill(self) -> None:
        """Kill all processes and their groups; those hold Megatron's background saver too."""
        for process in self.processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def output(self, rank: int | None = None) -> str:
        """Return the end of the standard output and error of one rank, or of all ranks."""
        texts = []
        for number in range(len(self.processes)) if rank is None else [rank]:
            path = self._file(number, "output")
            text = "(no output: ended before it started)"
            if path.exists():
                text = path.read_text(errors="replace")[-_SHOWN_OUTPUT:]
            texts.append(f"--- rank {number} ---\n{text}")
        return "\n".join(texts)

    def _file(self, rank: int, kind: str) -> Path:
        return self.folder / f"{kind}.{rank}"


def _child(
    rank: int,
    function: str,
    args: Any,
    kwargs: Any,
    nproc: int,
    folder: str,
    environment: dict[str, str],
    backend: str,
) -> None:
    """Run in each process: redirect output, join the world, call the function, write its result."""
    # By file descriptor, so that output of C++ code (gloo, NCCL) is redirected too.
    output = os.open(
        os.path.join(folder, f"output.{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
    )
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.setsid()  # a new process group, which `World.kill` kills as one
    if backend == "nccl":
        show_gpus(os.environ)
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc)
    )
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    try:
        import torch

        store = torch.distributed.FileStore(os.path.join(folder, "store"), nproc)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=nproc)
        module, _, name = function.partition(":")
        target: Callable[..., Any] = getattr(importlib.import_module(module), name)
        result = target(*args, **kwargs)
        Path(folder, f"result.{rank}").write_bytes(pickle.dumps(result))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
