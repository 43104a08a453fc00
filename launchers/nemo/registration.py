"""Registration with NeMo-Run: our executor, and its command line ``nemo mellum2 launch``.

This module has no ``from __future__ import annotations``. NeMo-Run's command line reads annotations
as types and refuses their names ("Unsupported type", nemo_run/cli/cli_parser.py, 0.11.1).
"""

import shlex
from collections.abc import Callable
from typing import Any

import nemo_run
from nemo_run.run.torchx_backend.schedulers import api as nemo_schedulers

from launchers.nemo.executor import Mellum2SlurmExecutor, slurm_executor
from launchers.nemo.scheduler import SCHEDULER
from launchers.nemo.tasks import task
from launchers.profile import profile_names
from mellum2_megatron.recipes import recipe_names


def register() -> None:
    """Register the executor, the factories and the command."""
    register_executor()
    register_factories()
    nemo_run.cli.entrypoint(launch, namespace="mellum2", type="experiment")


def register_executor() -> None:
    """Make NeMo-Run accept our executor.

    NeMo-Run looks an executor up by its exact class and does not recognise subclasses:
    ``EXECUTOR_MAPPING[executor.__class__]`` (nemo_run/run/torchx_backend/schedulers/api.py:57,
    0.11.1). So does ``Experiment.run`` (nemo_run/run/experiment.py,
    ``_PARALLEL_SUPPORTED_EXECUTORS`` and the like).
    """
    nemo_schedulers.EXECUTOR_MAPPING[Mellum2SlurmExecutor] = SCHEDULER
    nemo_schedulers.REVERSE_EXECUTOR_MAPPING[SCHEDULER] = Mellum2SlurmExecutor
    for feature in ("PARALLEL", "DETACH", "DEPENDENCY"):
        attribute = f"_{feature}_SUPPORTED_EXECUTORS"
        supported = getattr(nemo_run.Experiment, attribute)
        if Mellum2SlurmExecutor not in supported:
            setattr(nemo_run.Experiment, attribute, (*supported, Mellum2SlurmExecutor))


def register_factories() -> None:
    """Register each recipe as a factory of tasks, and each profile as a factory of executors."""
    for name in recipe_names():
        nemo_run.cli.factory(_task_factory(name), target=nemo_run.Script, name=name)
    for name in profile_names():
        for target in (nemo_run.Executor, nemo_run.SlurmExecutor):
            nemo_run.cli.factory(_executor_factory(name), target=target, name=name)


def launch(
    ctx: nemo_run.cli.RunContext,
    training: nemo_run.Script,
    executor: nemo_run.Executor,
    name: str = "mellum2",
) -> None:
    """Submit a training: nemo mellum2 launch training=RECIPE executor=PROFILE."""
    with nemo_run.Experiment(name, enable_goodbye_message=False) as experiment:
        experiment.add(training, executor=executor, name=name)
        experiment.run(detach=True)


def _task_factory(recipe: str) -> Callable[..., Any]:
    # One text for all overrides: NeMo-Run's command line cuts a factory's arguments at every comma,
    # also inside lists.
    def make(
        overrides: str = "", output: str = "", device: str = "auto"
    ) -> nemo_run.Config[nemo_run.Script]:
        script = task(
            recipe, overrides=shlex.split(overrides), output=output or None, device=device
        )
        fields = ("path", "entrypoint", "m", "args", "metadata")
        return nemo_run.Config(
            nemo_run.Script, **{field: getattr(script, field) for field in fields}
        )

    return make


def _executor_factory(profile: str) -> Callable[..., Any]:
    def make(nodes: int = 0, time: str = "") -> nemo_run.Config[Mellum2SlurmExecutor]:
        return slurm_executor(profile, nodes=nodes or None, time=time or None).to_config()

    return make
