"""Jobs of the scripts in ``golden/``; ``python -m tests.launchers.golden_jobs`` rewrites them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from launchers.job import ClusterJob
from launchers.profile import Container, Mount, Profile
from launchers.sbatch import render
from mellum2_megatron.recipes import recipe

GOLDEN = Path(__file__).parent / "golden"


def golden_jobs() -> dict[str, ClusterJob]:
    """Return the jobs by file name. Their run folders, images and data do not exist."""
    run = recipe("mellum2_tiny_pretrain")
    lustre = (
        Mount(source="/lustre", target="/lustre"),
        Mount(source="/raid/data", target="/data", read_only=True),
    )
    site = Profile(
        name="site",
        account="nlp",
        partition="h100",
        qos="long",
        time="1-00:00:00",
        gpus_per_node=8,
        cpus_per_task=96,
        memory="0",
        exclusive=True,
        sbatch={"constraint": "h100", "reservation": "the big one", "spread-job": True},
        srun=("--mpi=none",),
        modules=("slurm", "cuda/13.0"),
        setup=("ulimit -n 65536",),
        environment=("WANDB_API_KEY", "HF_TOKEN"),
        variables={"NCCL_DEBUG": "INFO", "GREETING": "it's me"},
        python="/lustre/venv/bin/python",
        grace_seconds=300,
    )
    job = ClusterJob(
        name="tiny",
        run=run,
        folder=Path("/lustre/runs/my tiny run"),
        nodes=2,
        ranks_per_node=8,
        device="cuda",
        profile=site,
        code=Path("/lustre/runs/my tiny run/code"),
    )

    def inside(container: Container) -> ClusterJob:
        return dataclasses.replace(
            job, profile=dataclasses.replace(site, python=None, container=container)
        )

    return {
        "bare": job,
        "pyxis": inside(
            Container(
                image="registry.site#nvidia/pytorch:25.10-py3",
                runtime="pyxis",
                mounts=lustre,
                arguments=("--no-container-mount-home",),
            )
        ),
        "apptainer": inside(
            Container(
                image="/lustre/images/mellum 2.sif",
                runtime="apptainer",
                mounts=lustre,
                arguments=("--cleanenv=false",),
            )
        ),
        "enroot": inside(
            Container(
                image="/lustre/images/mellum2.sqsh",
                runtime="enroot",
                mounts=lustre,
                arguments=("--rw",),
            )
        ),
        "array": dataclasses.replace(
            job, tasks=(run, run, run), dependency=("afterok:17", "afterany:18")
        ),
        "cpu": ClusterJob(
            name="tiny",
            run=run,
            folder=Path("/home/me/runs/tiny"),
            nodes=2,
            ranks_per_node=1,
            device="cpu",
            profile=Profile(name="small", account="none", python="/home/me/.venv/bin/python"),
        ),
    }


if __name__ == "__main__":
    for name, job in golden_jobs().items():
        (GOLDEN / f"{name}.sbatch").write_text(render(job))
        sys.stdout.write(f"wrote {GOLDEN / name}.sbatch\n")
