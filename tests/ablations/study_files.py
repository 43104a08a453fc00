"""Run folders of a made-up study, written without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ablations.answering.comparison import Comparison, compare
from ablations.asking.finding import NamedStudy
from ablations.asking.planned import Plan, plan_study
from ablations.asking.study import Arm, Claim, Metric, Study
from ablations.running.results import TaskOnDisk, TaskRecord, task_folder, tasks_on_disk
from ablations.running.statement import STATED_FILE, Statement, read_statement
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.files import write_json, write_text
from mellum2_megatron.common.values import to_plain
from mellum2_megatron.config import Run, apply_overrides, to_yaml
from mellum2_megatron.metrics.validation_sums import ValidationSums, position_starts
from mellum2_megatron.recipes import recipe

NAME = "second_head"


def base() -> Run:
    """Return the base of the study: ten steps of the tiny recipe."""
    small = ["schedule.train_samples=80", "schedule.decay_samples=8", "schedule.warmup_samples=8"]
    fixed = ["schedule.batch_schedule=[[0,8]]", "logging.validation_documents=true"]
    return apply_overrides(recipe("mellum2_tiny_pretrain"), [*small, *fixed])


STUDY = Study(
    question="Does a second head help?",
    arms=(
        Arm("with"),
        Arm("without", "architecture.num_mtp_layers=0"),
        Arm("flat", "loss.z_loss_coef=0.01"),
    ),
    control="without",
    metrics=(Metric("valid_loss", delta=0.05), Metric("step_seconds", delta=0.01)),
    claim=Claim(text="HumanEval 20.73 -> 31.10", source="report §6", expected={"with": "better"}),
    bases={"tiny": base},
)
EFFECT = {"with": -0.2, "without": 0.0, "flat": 0.001}
STEPS = 10
DOCUMENTS = 120


def plan_of(study: Study = STUDY) -> Plan:
    return plan_study(NamedStudy(name=NAME, file=Path(f"{NAME}.py"), study=study), "tiny")


def run_of(arm: str, seed: int, folder: Path) -> Run:
    return apply_overrides(plan_of().arm(arm).run, [f"seed={seed}", f"checkpoint.output={folder}"])


def sums_of(arm: str, seed: int, *, length: int, documents: int = DOCUMENTS) -> ValidationSums:
    """Return sums whose loss is 3 + the arm's effect + the seed's, and little noise of its own."""
    fixed = np.random.default_rng(7)
    tokens = fixed.integers(50, 150, documents)
    level = fixed.normal(3, 0.3, documents)
    own = np.random.default_rng([seed, len(arm)]).normal(0, 0.01, documents)
    nats = tokens * (level + EFFECT[arm] + 0.1 * seed + own)
    starts = position_starts(length)
    buckets = np.zeros((1, len(starts)), dtype=np.int64)
    buckets[0, -1] = tokens.sum()
    return ValidationSums(
        corpora=("valid",),
        document=np.arange(documents, dtype=np.uint64),
        corpus=np.zeros(documents, dtype=np.int64),
        tokens=tokens,
        bytes=tokens * 3,
        nats=nats,
        position_start=starts,
        position_tokens=buckets,
        position_nats=np.where(buckets > 0, nats.sum(), 0.0),
    )


def write_task(
    results: Path,
    arm: str,
    seed: int,
    *,
    change: Callable[[Run], Run] = lambda run: run,
    state: str = "done",
    sums: ValidationSums | None = None,
    hours: tuple[int, int] | None = None,
    others: float | None = 0.1,
) -> Path:
    """Write a task's folder; by default tasks follow each other on one machine.

    ``others``: cores of 8 that other processes kept busy; None: the run did not record it.
    """
    folder = task_folder(results, NAME, "tiny", arm, seed)
    run = change(run_of(arm, seed, folder))
    index = seed * len(STUDY.arms) + [one.name for one in STUDY.arms].index(arm)
    first, last = hours or (index, index + 1)
    record = TaskRecord(
        study=NAME,
        scale="tiny",
        arm=arm,
        seed=seed,
        hash=f"{arm}{seed}",
        identity={},
        state=state,  # type: ignore[arg-type]
        message="" if state == "done" else "out of memory",
        started=f"2026-11-27T{first:02}:00:00+00:00",
        ended=f"2026-11-27T{last:02}:00:00+00:00",
    )
    record.write(folder)
    write_text(folder / RUN_FILE, to_yaml(run))
    lines = [
        {
            "kind": "train",
            "step": step,
            "lm_loss": 6 / step + EFFECT[arm] + 0.1 * seed,
            "grad_norm": 0.5,
            "seconds_per_step": 2.0 if arm == "with" else 1.0,
            "tokens_per_second": 1000.0,
            "expert_load/layer_00/max_over_mean": 1.5,
            # The arm without a head logs neither.
            **({} if arm == "without" else {"mtp_loss": 7.0 / step, "mtp_acceptance": 0.25}),
        }
        for step in range(1, STEPS + 1)
    ]
    note = "the loss is 9.0000, 3.00 times the median of 8 steps: the update is skipped"
    lines.append({"kind": "event", "step": 4, "note": note, "value": 9.0, "skipped": 1.0})
    lines.append({"kind": "valid", "step": STEPS, "lm_loss": 4.0})
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    code = {"origin": "git", "version": "1", "commit": "0123456789abcdef" * 2 + "01234567"}
    start = {"event": "start", "code": {**code, "dirty": False}, "host": "node-1"}
    load = {} if others is None else {"load": {"cores": 8, "own": 1.0, "others": others}}
    end = {"event": "end", "outcome": "finished", **load}
    write_text(folder / "provenance.jsonl", f"{json.dumps(start)}\n{json.dumps(end)}\n")
    (sums or sums_of(arm, seed, length=run.data.sequence_length)).write(folder, STEPS)
    return folder


def write_study(results: Path, seeds: int = 3) -> None:
    for arm in STUDY.arms:
        for seed in range(1, seeds + 1):
            write_task(results, arm.name, seed)
    folder = results / NAME / "tiny"
    write_json(folder / STATED_FILE, to_plain(Statement.of(STUDY, time="2026-11-26T00:00:00")))


def compared(results: Path, study: Study = STUDY) -> Comparison:
    """Return the finished runs of the study in a folder, compared."""
    return compare(plan_of(study), tasks(results), read_statement(results / NAME / "tiny"))


def tasks(results: Path) -> list[TaskOnDisk]:
    return list(tasks_on_disk(results, NAME, "tiny"))
