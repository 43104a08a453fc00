"""What a job comes to, before it is submitted: layout and memory, time, script. Nothing is written
or started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from launchers.job import ClusterJob, missing_variables
from mellum2_megatron.config import Run, to_yaml
from mellum2_megatron.planning.layout_report import layout_report, render_layout

ASSUMED_TFLOPS = 350.0
"""Model TFLOP/s that a GPU of the H100 class is taken to reach, if nobody says otherwise.

An assumption, no measurement: the best published neighbour, Moonlight-16B-A3B on H100 in BF16,
comes to 387.
"""

_DAY = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """How long a run takes at an assumed rate.

    Attributes:
        tflops: model TFLOP/s of a rank, assumed.
        flops_per_token: forward and backward, windows counted.
        tokens_per_second: of all ranks.
        tokens: from the run's first to its last.
    """

    tflops: float
    flops_per_token: float
    tokens_per_second: float
    tokens: int

    @property
    def days(self) -> float:
        """Time for all tokens, without saves, validations and restarts."""
        return self.tokens / self.tokens_per_second / _DAY


def estimate(run: Run, *, world_size: int, tflops: float) -> Estimate:
    """Return how long a run takes on ``world_size`` ranks of ``tflops`` model TFLOP/s each."""
    length = run.data.sequence_length
    flops = run.architecture.flops_per_token(length)
    return Estimate(
        tflops=tflops,
        flops_per_token=flops,
        tokens_per_second=world_size * tflops * 1e12 / flops,
        tokens=(run.schedule.train_samples - run.data.first_sample) * length,
    )


def estimate_text(job: ClusterJob, tflops: float | None) -> str:
    """Return the estimate in words; ``tflops`` None assumes a rate for GPUs and none for CPUs."""
    if tflops is None and job.device == "cpu":
        return (
            "No estimate of time: there is no rate to assume for CPUs; --assumed-tflops gives one."
        )
    found = estimate(
        job.run, world_size=job.world_size, tflops=ASSUMED_TFLOPS if tflops is None else tflops
    )
    duration = _duration(found.days)
    source = "an assumed" if tflops is None else "the given"
    return (
        f"{found.tokens_per_second:,.0f} tokens/s and {duration} for {found.tokens:,} tokens, at {source} "
        f"{found.tflops:g} model TFLOP/s a rank ({found.flops_per_token / 1e9:,.3f} GFLOP a token). "
        "Not measured: an estimate, without saves, validations and restarts; --assumed-tflops changes the rate, and "
        "benchmarks/NOTES.md says what has been measured."
    )


def _duration(days: float) -> str:
    for unit, number in {"days": days, "hours": days * 24}.items():
        if number >= 1:
            return f"{number:,.1f} {unit}"
    return f"{days * 1440:,.1f} minutes"


def show(
    console: Console,
    job: ClusterJob,
    script: str | None,
    *,
    tflops: float | None,
    notes: Sequence[str] = (),
) -> None:
    """Print the resolved run, layout and memory, the estimate, and the script as it would be
    submitted."""
    console.out(
        f"# The run{'s have in common' if job.tasks else ''}", style="bold", highlight=False
    )
    console.out(to_yaml(job.run), highlight=False)
    for table in render_layout(layout_report(job.run, world_size=job.world_size)):
        console.print(table)
        console.print()
    console.print(_table(job))
    console.print()
    for line in (estimate_text(job, tflops), *notes, *warnings(job)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if script is not None:
        console.out("\n# The script", style="bold", highlight=False)
        console.out(script, highlight=False)


def warnings(job: ClusterJob) -> list[str]:
    """Return what is no error and yet worth knowing before a job is submitted."""
    missing = missing_variables(job.profile)
    if not missing:
        return []
    return [
        f"Not set in this shell, so not in the job either (profile, environment): {', '.join(missing)}"
    ]


def _table(job: ClusterJob) -> Table:
    table = Table(
        title="Job",
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        pad_edge=False,
    )
    each = f"{job.ranks_per_node} {job.device} rank{'s' * (job.ranks_per_node > 1)}"
    container = job.profile.container
    rows = {
        "name": job.name,
        "profile": job.profile.name,
        "world": f"{job.world_size} ranks: {job.nodes} node{'s' * (job.nodes > 1)} of {each}",
        "array": f"{len(job.tasks)} tasks" if job.tasks else None,
        "time limit": job.profile.time,
        "container": None if container is None else f"{container.image} ({container.runtime})",
        "folder": str(job.folder),
        "code": "as installed here" if job.code is None else str(job.code),
        "waits for": ", ".join(job.dependency) or None,
    }
    for key, value in rows.items():
        if value is not None:
            table.add_row(key, value)
    return table
