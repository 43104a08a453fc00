"""Record of a run's submissions: an entry for each in the run folder's `launch.json`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launchers.job import ClusterJob
from launchers.packaging import Packager
from mellum2_megatron.checkpoint import output_folder
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.common.provenance import record, source_code

LAUNCH_FILE = "launch.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One submission.

    Attributes:
        time: time of submission, ISO 8601, UTC.
        executor: ``slurm`` or ``local``.
        job_id: Slurm's job number; for a local run NeMo-Run's name of it.
        tasks: number of tasks of an array; default 0, for an ordinary job.
        task_folders: their folders below the run folder; empty (default): ``0``, ``1`` ..
        experiment: NeMo-Run's experiment id, for ``nemo experiment``; None without NeMo-Run.
        profile: name of the site profile.
        nodes: number of nodes.
        ranks_per_node: ranks on each node.
        device: device of the ranks.
        script: batch script; None for a local run.
        dependency: Slurm's conditions, default none.
        code: version, commit and state of the code, see `mellum2_megatron.common.provenance.Code`.
        packager: ``shared`` or ``git``, see `launchers.packaging`.
        command: command line that submitted the job.
    """

    time: str
    executor: str
    job_id: str
    tasks: int = 0
    task_folders: tuple[str, ...] = ()
    experiment: str | None = None
    profile: str
    nodes: int
    ranks_per_node: int
    device: str
    script: str | None = None
    dependency: tuple[str, ...] = ()
    code: dict[str, Any]
    packager: Packager
    command: tuple[str, ...] = ()


def record_launch(
    job: ClusterJob,
    *,
    job_id: str,
    experiment: str | None,
    script: Path | None,
    dependency: Sequence[str] = (),
) -> Launch:
    """Append a submission to the job's `LAUNCH_FILE` and to its runs' ``provenance.jsonl``.

    Args:
        job: submitted job.
        job_id, experiment, script, dependency: see `Launch`.
    """
    launch = Launch(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        executor=job.profile.executor,
        job_id=job_id,
        tasks=len(job.tasks),
        task_folders=job.task_folders,
        experiment=experiment,
        profile=job.profile.name,
        nodes=job.nodes,
        ranks_per_node=job.ranks_per_node,
        device=job.device,
        script=None if script is None else str(script),
        dependency=tuple(dependency),
        code=asdict(source_code(job.code)),
        packager=job.profile.packager,
        command=tuple(sys.argv),
    )
    # Rewritten atomically: a reader never sees half an entry.
    write_json(
        job.folder / LAUNCH_FILE,
        {"launches": [asdict(entry) for entry in (*read_launches(job.folder), launch)]},
    )
    more = {"job": job_id, "profile": job.profile.name, "experiment": experiment}
    for run in job.runs:
        record(output_folder(run), event="launch", world_size=job.world_size, more=more)
    return launch


def read_launches(folder: Path) -> tuple[Launch, ...]:
    """Return the submissions of a run, oldest first.

    Raises:
        InputError: the file was not written by `record_launch`.
    """
    path = folder / LAUNCH_FILE
    if not path.is_file():
        return ()
    known = {field.name for field in dataclasses.fields(Launch)}
    launches = []
    try:
        for entry in load_json(path)["launches"]:
            # Unknown keys are dropped: a later version may have written the file.
            values = {key: value for key, value in entry.items() if key in known}
            lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
            launches.append(Launch(**(values | lists)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            str(path),
            rule=f"is not what a launch writes ({error})",
            fix="move the file away; nothing else needs it",
        ) from None
    return tuple(launches)
