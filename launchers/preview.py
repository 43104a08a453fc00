"""Show a job before it is submitted: run, layout and memory, time estimate, script.

Nothing is written or started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from launchers.job import ClusterJob, missing_variables
from mellum2_megatron.common.console import console, plain_table
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run, to_yaml
from mellum2_megatron.data.feed.entries import is_absent
from mellum2_megatron.planning.gpus import Machine, find_gpu
from mellum2_megatron.planning.layout_report import layout_report, render_layout
from mellum2_megatron.planning.memory_fit import memory_note
from mellum2_megatron.planning.start_notes import start_notes
from mellum2_megatron.planning.step_time import CARDS, StepTime, render_step, step_time

USUAL_CARD = "h100"
"""Card of the estimate where the profile names none."""

_DAY_SECONDS = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Duration of a run at a rate.

    Attributes:
        tflops: rate of a rank, model TFLOP/s.
        flops_per_token: model FLOPs of a token, forward and backward, with sliding windows.
        tokens_per_second: tokens per second of all ranks together.
        tokens: number of tokens that the run trains on.
    """

    tflops: float
    flops_per_token: float
    tokens_per_second: float
    tokens: int

    @property
    def days(self) -> float:
        """Days for all tokens, without saves, validations and restarts."""
        return self.tokens / self.tokens_per_second / _DAY_SECONDS


def estimate(run: Run, *, world_size: int, tflops: float) -> Estimate:
    """Return the duration of a run on ``world_size`` ranks of ``tflops`` model TFLOP/s each."""
    length = run.data.sequence_length
    flops = run.architecture.flops_per_token(length)
    return Estimate(
        tflops=tflops,
        flops_per_token=flops,
        tokens_per_second=world_size * tflops * 1e12 / flops,
        # train_samples counts from the first sample of phase 1; this run starts at first_sample.
        tokens=(run.schedule.train_samples - run.data.first_sample) * length,
    )


def step_estimate(job: ClusterJob) -> tuple[StepTime, Machine] | None:
    """Return the estimated step of a job, and its card; None without rates for its device."""
    card = job.profile.gpu or USUAL_CARD
    if job.device == "cpu" or card not in CARDS:
        return None
    gpu = find_gpu(card)
    return step_time(job.run, world_size=job.world_size, gpu=gpu), gpu


def estimate_text(
    job: ClusterJob, tflops: float | None, found: tuple[StepTime, Machine] | None
) -> str:
    """Return the estimate in words.

    Args:
        job: planned job.
        tflops: rate of a rank, model TFLOP/s. None takes that of ``found``.
        found: the job's `step_estimate`; None without one, or where ``tflops`` is given.
    """
    if found is None and tflops is None:
        device = "CPUs" if job.device == "cpu" else str(job.profile.gpu)
        return (
            f"No estimate of time: there is no rate to assume for {device}; --assumed-tflops "
            "gives one."
        )
    rate, source = (tflops, "the given") if found is None else (found[0].tflops, "an estimated")
    assert rate is not None
    result = estimate(job.run, world_size=job.world_size, tflops=rate)
    duration = f"{result.days * 1440:,.1f} minutes"
    if result.days >= 1:
        duration = f"{result.days:,.1f} days"
    elif result.days * 24 >= 1:
        duration = f"{result.days * 24:,.1f} hours"
    card = "" if found is None else f" of {found[1].label}"
    return (
        f"{result.tokens_per_second:,.0f} tokens/s and {duration} for {result.tokens:,} tokens, "
        f"at {source} {result.tflops:,.4g} model TFLOP/s a rank{card} "
        f"({result.flops_per_token / 1e9:,.3f} GFLOP a token). "
        "Not measured: an estimate, without saves, validations and restarts. "
        "--assumed-tflops changes the rate; benchmarks/NOTES.md has the measurements."
    )


def show(
    job: ClusterJob,
    script: str | None,
    *,
    tflops: float | None,
    notes: Sequence[str] = (),
) -> None:
    """Print the resolved run, layout and memory, the job, the estimate, and the script.

    Args:
        job: planned job.
        script: batch script; None for a job on this machine.
        tflops: rate of a rank, model TFLOP/s; None estimates it (`step_estimate`).
        notes: further lines to print after the estimate, default none.
    """
    title = "# Shared part of the array's runs" if job.tasks else "# The run"
    # `out` neither wraps nor marks up: run and script can be copied from the screen.
    console.out(title, style="bold", highlight=False)
    console.out(to_yaml(job.run), highlight=False)
    for table in render_layout(layout_report(job.run, world_size=job.world_size)):
        console.print(table)
        console.print()
    found = step_estimate(job) if tflops is None else None
    if found is not None:
        console.print(render_step(found[0], gpu=found[1]))
        console.print()
    ranks = f"{job.ranks_per_node} {job.device} rank{'s' * (job.ranks_per_node > 1)}"
    container = job.profile.container
    rows = {
        "name": job.name,
        "profile": job.profile.name,
        "world": f"{job.world_size} ranks: {job.nodes} node{'s' * (job.nodes > 1)} of {ranks}",
        "array": f"{len(job.tasks)} tasks" if job.tasks else None,
        "time limit": job.profile.time,
        "container": None if container is None else f"{container.image} ({container.runtime})",
        "folder": str(job.folder),
        "code": "as installed here" if job.code is None else str(job.code),
        "waits for": ", ".join(job.dependency) or None,
    }
    job_table = plain_table(title="Job", show_header=False)
    for key, value in rows.items():
        if value is not None:
            job_table.add_row(key, value)
    console.print(job_table)
    console.print()
    for line in (estimate_text(job, tflops, found), *notes, *warnings(job)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if script is not None:
        console.out("\n# The script", style="bold", highlight=False)
        console.out(script, highlight=False)


def warnings(job: ClusterJob) -> list[str]:
    """Return remarks about a job that are no reason to refuse it."""
    lines = start_notes(job.run, job.world_size, job.profile.card)
    if job.device == "cuda" and job.profile.card is None:
        lines.append(memory_note(job.run, world_size=job.world_size))
    lines += _index_notes(job)
    missing = missing_variables(job.profile)
    if missing:
        lines.append(
            "Not set in this shell, so not in the job either (profile, environment): "
            f"{', '.join(missing)}"
        )
    return lines


def _index_notes(job: ClusterJob) -> list[str]:
    """Return what is to be said about missing sample indices of the job's runs."""
    lines = []
    for run in job.runs:
        if run.data.feed == "rollouts" or is_absent(run.data):
            continue
        # Imports numpy, which a preview without data does not need.
        from mellum2_megatron.data.feed.index_plan import index_notes
        from mellum2_megatron.data.feed.sources import check_data

        # Bad data are refused, or shown, by the checks of the job's files.
        with contextlib.suppress(InputError):
            lines += index_notes(
                run, check_data(run), "`mellum2 data index` with this recipe and these overrides"
            )
    return list(dict.fromkeys(lines))
