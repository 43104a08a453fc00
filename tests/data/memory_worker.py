"""Runs a corpus plan in a process of its own, which has imported little else."""

from __future__ import annotations

from pathlib import Path

from mellum2_megatron.data.pipeline.graph import STAGES, Graph
from mellum2_megatron.data.pipeline.plan_file import read_plan
from mellum2_megatron.data.pipeline.tasks import run_task


def peak() -> float:
    """Return the largest memory of this process so far, in MiB.

    Not `resource.getrusage`: its figure begins with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peaks(plan_file: Path) -> dict[str, float]:
    """Run a plan in this process; return the growth of its peak after each stage, in MiB."""
    plan = read_plan(plan_file)
    graph = Graph.of(plan, plan_file.parent / "results")
    before, found = peak(), {}
    for stage in STAGES:
        for task in graph.tasks(stage):
            run_task(task, graph.results)
        found[stage] = peak() - before
    return found
