"""NeMo-Run: tasks, executors and a scheduler for `mellum2 launch` and for your own experiments.

::

    import nemo_run
    from launchers import nemo

    with nemo_run.Experiment("mellum2") as experiment:
        experiment.add(
            nemo.task("mellum2_tiny_pretrain", overrides=["optimizer.lr=1e-3"]),
            executor=nemo.slurm_executor("mycluster", nodes=2),
            name="tiny",
        )
        experiment.run(detach=True)

NeMo-Run keeps experiments, dependencies and status. The batch script is ours
(`launchers.sbatch`), the same as with ``--render sbatch``. Under NeMo-Run's own script a preempted
run does not survive (docs/launching.md).

- `tasks`: a training as a task; tasks for NeMo-Run's own launchers.
- `executor`: a site profile in the form of a NeMo-Run executor.
- `scheduler`: submission with `sbatch`, and states of jobs.
- `experiments`: the experiments of `mellum2 launch`.
- `registration`: registration of all these with NeMo-Run.

Only this package imports nemo_run.
"""

from __future__ import annotations

from launchers.nemo.executor import Mellum2SlurmExecutor, profile_text, slurm_executor
from launchers.nemo.experiments import run_here, submit
from launchers.nemo.registration import register
from launchers.nemo.scheduler import SCHEDULER, Mellum2Scheduler, create_scheduler, overall
from launchers.nemo.tasks import fault_tolerance, rank_task, task

__all__ = [
    "SCHEDULER",
    "Mellum2Scheduler",
    "Mellum2SlurmExecutor",
    "create_scheduler",
    "fault_tolerance",
    "overall",
    "profile_text",
    "rank_task",
    "run_here",
    "slurm_executor",
    "submit",
    "task",
]

# NeMo-Run and torchx only import this module, by its entry points (pyproject.toml), and call
# nothing in it: the import itself must register.
register()
