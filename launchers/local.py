"""Start a run on this machine: torchrun, one process a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from mellum2_megatron.run import Device


def train_command(run_file: Path, *, nproc: int, device: Device, verbose: bool = False) -> list[str]:
    """Return the command that trains a resolved run on `nproc` local ranks.

    `--standalone` makes torchrun pick a free port, so that runs on one machine do not meet.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    command += ["-m", "mellum2_megatron.train", str(run_file), "--device", device]
    return [*command, "--verbose"] if verbose else command


def train_environment(nproc: int, device: Device) -> dict[str, str]:
    """Return this process's environment with what local ranks need, where it does not say otherwise."""
    environment = dict(os.environ)
    if device == "cpu":
        # torchrun sets 1 for several ranks; a rank's share of the cores is what it can use.
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.setdefault("TORCHELASTIC_ERROR_FILE", os.devnull)
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return environment


def run_local(run_file: Path, *, nproc: int, device: Device, verbose: bool = False) -> int:
    """Train and wait; an interrupt goes to the ranks, whose exit code is returned (0 only if all succeeded)."""
    process = subprocess.Popen(
        train_command(run_file, nproc=nproc, device=device, verbose=verbose),
        env=train_environment(nproc, device),
    )
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
