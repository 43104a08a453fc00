"""Trainings as NeMo-Run tasks."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nemo_run

from launchers.job import with_absolute_paths
from launchers.profile import Profile
from launchers.submission import run_to_launch
from mellum2_megatron.checkpoint import (
    StartingPoint,
    check_run_folder,
    output_folder,
    write_run_folder,
)
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Device, Run, to_yaml
from mellum2_megatron.planning.optional_packages import OLDEST_RESILIENCY, too_old_resiliency

RUN_KEY = "mellum2_run"
"""Metadata key of a task; its value is the resolved run as YAML."""

# ft_launcher lies beside the interpreter, whose folder need not be on PATH.
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def task(
    name: str,
    *,
    overrides: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    nproc: int | None = None,
) -> nemo_run.Script:
    """Return a training as a task for `nemo_run.Experiment.add`.

    With `slurm_executor` the task is a job with the ranks of all nodes; with
    `nemo_run.LocalExecutor` it is ``mellum2 train``.

    Args:
        name: recipe, or the YAML file of a resolved run.
        overrides: ``key=value`` words.
        output: run folder, default the run's own, else ``runs/NAME`` in the profile's folder.
        device, nproc: as in ``mellum2 train``; our Slurm executor takes both from the profile.

    Raises:
        InputError: an unknown recipe or key, or an invalid value.
    """
    words = [name, *overrides]
    if output is not None:
        words += ["--output", os.fspath(output)]
    words += ["--device", device]
    if nproc is not None:
        words += ["--nproc", str(nproc)]
    return train_script(run_to_launch(name, overrides, output), words)


def train_script(run: Run, words: Sequence[str]) -> nemo_run.Script:
    """Return ``mellum2 train WORDS`` as a task with its resolved run as metadata."""
    return nemo_run.Script(
        path="mellum2_megatron",
        entrypoint=sys.executable,
        m=True,
        args=["train", *words],
        metadata={RUN_KEY: to_yaml(run)},
    )


def rank_task(
    name: str,
    *,
    overrides: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    device: Device = "cuda",
) -> nemo_run.Script:
    """Return the process of one rank, for a launcher that starts all ranks itself.

    Such launchers are `nemo_run.Torchrun` and `fault_tolerance`; they have their own way of
    restarting failed ranks. This function writes the run folder.

    Args:
        name, overrides, output: see `task`.
        device: device of the ranks, default cuda.

    Raises:
        InputError: as for `task`; no data, no tokenizer, or a folder that cannot be used.
    """
    run = with_absolute_paths(
        run_to_launch(name, overrides, output), Profile(name="here", executor="local")
    )
    check_run_folder(run, StartingPoint.of(run))
    write_run_folder(run)
    words = [str(output_folder(run) / RUN_FILE), "--device", device]
    return nemo_run.Script(
        path="mellum2_megatron.training", entrypoint=sys.executable, m=True, args=words
    )


def fault_tolerance(**settings: Any) -> nemo_run.FaultTolerance:
    """Return NeMo-Run's fault-tolerance launcher for `rank_task`, with a random port.

    Args:
        settings: fields of `nemo_run.FaultTolerance`.

    Raises:
        InputError: NVIDIA's resiliency extension is missing, or older than Megatron needs.
    """
    if (
        importlib.util.find_spec("nvidia_resiliency_ext") is None
        or shutil.which("ft_launcher", path=_PATH) is None
    ):
        raise InputError(
            "run.FaultTolerance",
            rule="starts ranks with ft_launcher, which is not installed",
            fix=f"pip install 'nvidia-resiliency-ext>={OLDEST_RESILIENCY}'",
        )
    old_version = too_old_resiliency()
    if old_version is not None:
        raise InputError(
            f"nvidia-resiliency-ext {old_version}",
            rule="is too old: with it Megatron-Core 0.19.2 cannot be imported, or cannot save "
            "(megatron/core/dist_checkpointing/strategies/nvrx.py, NVRX_MIN_VERSION)",
            fix=f"pip install 'nvidia-resiliency-ext>={OLDEST_RESILIENCY}', or remove it",
        )
    # NeMo-Run gives every job port 29500 (nemo_run/core/execution/launcher.py:81, 0.11.1), where
    # ranks of two jobs on one node would connect to each other.
    return nemo_run.FaultTolerance(**{"rdzv_port": 10_000 + secrets.randbelow(20_000), **settings})
