"""Start runs on this machine or on a Slurm cluster, and follow them.

- On this machine (`mellum2 train`): `start` checks a run, `local` starts its ranks.
- On a cluster (`mellum2 launch`): `submission` plans and checks jobs (`job`) with a site's
  `profile`, and `packaging` takes their code. `nemo` submits them; `batch_job` writes run folder
  and batch script (`sbatch`); `slurm` calls Slurm's commands; `launch_record` keeps a record.
- In a job: the batch script starts an `agent` on every node, which starts the node's ranks with
  `local`. When they have ended, `outcome` decides whether the job starts again.
- Afterwards: `status` finds jobs, their states and logs.
"""
