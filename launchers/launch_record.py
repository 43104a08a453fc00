"""What was submitted for a run: one entry in its folder's `launch.json` for each time."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launchers.job import Job
from launchers.packaging import Packager
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.provenance import Code, record, source_code

LAUNCH_FILE = "launch.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One submission.

    Attributes:
        time: of it, UTC.
        executor: ``slurm`` or ``local``.
        job_id: Slurm's number; of a local run the name NeMo-Run gives it.
        tasks: of the array; 0 if it is none.
        experiment: NeMo-Run's id, for ``nemo experiment``; None without it.
        profile: its name.
        nodes, ranks_per_node, device: the world.
        script: the batch script; None of a local run.
        dependency: what it waits for.
        code: see `mellum2_megatron.common.provenance.Code`.
        packager: how the code came there.
        command: words that submitted it.
    """

    time: str
    executor: str
    job_id: str
    tasks: int = 0
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
    job: Job,
    *,
    job_id: str,
    experiment: str | None,
    script: Path | None,
    dependency: Sequence[str] = (),
) -> Launch:
    """Append a submission to `LAUNCH_FILE` of the job's folder and a line to its runs'
    ``provenance.jsonl``."""
    launch = Launch(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        executor=job.profile.executor,
        job_id=job_id,
        tasks=len(job.tasks),
        experiment=experiment,
        profile=job.profile.name,
        nodes=job.nodes,
        ranks_per_node=job.ranks_per_node,
        device=job.device,
        script=None if script is None else str(script),
        dependency=tuple(dependency),
        code=asdict(job_code(job)),
        packager=job.profile.packager,
        command=tuple(sys.argv),
    )
    write_json(
        job.folder / LAUNCH_FILE,
        {"launches": [asdict(each) for each in (*read_launches(job.folder), launch)]},
    )
    for run in job.runs:
        assert run.checkpoint.output is not None
        more = {"job": job_id, "profile": job.profile.name, "experiment": experiment}
        record(Path(run.checkpoint.output), event="launch", world_size=job.world_size, more=more)
    return launch


def read_launches(folder: Path) -> tuple[Launch, ...]:
    """Return what was submitted for a run, oldest first; nothing if it never was.

    Raises:
        InputError: the file is not what `record_launch` writes.
    """
    path = folder / LAUNCH_FILE
    if not path.is_file():
        return ()
    try:
        return tuple(map(_launch, json.loads(path.read_text(encoding="utf-8"))["launches"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            str(path),
            rule=f"is not what a launch writes ({error})",
            fix="move the file away; nothing else needs it",
        ) from None


def _launch(entry: dict[str, Any]) -> Launch:
    known = {field.name for field in dataclasses.fields(Launch)}
    values: dict[str, Any] = {key: value for key, value in entry.items() if key in known}
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Launch(**(values | lists))


def job_code(job: Job) -> Code:
    """Return where a job's code comes from."""
    return source_code(job.code)
