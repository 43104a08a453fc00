"""A study's runs, compared: figures by arm and seed, answers, and what is missing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ablations.answering.common_documents import CommonDocuments, common_documents
from ablations.answering.comparable import check_comparable
from ablations.answering.document_bootstrap import (
    ENOUGH,
    document_interval,
    effective_documents,
)
from ablations.answering.run_measures import RunMeasures, measure
from ablations.answering.seed_plan import SeedPlan
from ablations.answering.verdicts import Answer, Interval, answer, without_verdict
from ablations.asking.planned import Plan
from ablations.asking.study import METRICS, Scale, Study
from ablations.running.identity import PACKAGES
from ablations.running.results import TaskOnDisk
from ablations.running.statement import Statement, statement_notes

TIMES = frozenset(("step_seconds", "tokens_per_second"))
"""Metrics that measure a machine and what else it does."""

CROWDED = 0.05
"""Share of a machine's cores that other processes may keep busy; above, times are no evidence."""

Figures = Mapping[str, Mapping[int, float]]
"""Value of a metric by arm and seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentAnswer:
    """Difference of an arm from the control over documents, for the checkpoints that there are.

    Attributes:
        arm: name of the arm.
        seeds: number of paired seeds whose sums were averaged.
        documents, effective: number of common documents, and of equal ones that vary like them.
        per_token: interval of the difference in nats a token; None where tokens differ.
        bits_per_byte: interval of the difference in bits a byte.
    """

    arm: str
    seeds: int
    documents: int
    effective: float
    per_token: Interval | None
    bits_per_byte: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All that a report shows.

    Attributes:
        name: name of the study.
        study: the study.
        scale: its scale.
        runs: finished runs, by arm in the study's order and by rising seed.
        absent: task without a finished run, and the reason.
        figures: values by name of metric.
        answers: answers on each arm but the control, by name of metric; the first decides.
        documents: differences over documents, none without sums by document.
        time_doubt: reason why times of the runs are no evidence of speed; empty: none is known.
        notes: facts that limit the comparison, one sentence each.
    """

    name: str
    study: Study
    scale: Scale
    runs: tuple[RunMeasures, ...]
    absent: tuple[tuple[str, str], ...]
    figures: Mapping[str, Figures]
    answers: Mapping[str, tuple[Answer, ...]]
    documents: tuple[DocumentAnswer, ...]
    time_doubt: str
    notes: tuple[str, ...]

    def of_arm(self, arm: str) -> tuple[RunMeasures, ...]:
        """Return the finished runs of an arm."""
        return tuple(run for run in self.runs if run.arm == arm)


def compare(plan: Plan, tasks: Iterable[TaskOnDisk], stated: Statement | None) -> Comparison:
    """Compare the finished tasks of a study. Missing arms and seeds are named, not refused.

    Args:
        plan: the study at its scale.
        tasks: its tasks that have results.
        stated: what the study stated when its runs began; None: nothing shows it.

    Raises:
        InputError: a file of a finished run is damaged, or runs differ in more than their arms.
    """
    study = plan.study
    runs, seeds, absent = _read(study, tasks)
    check_comparable(plan, runs)
    common = common_documents(runs)
    figures = _figures(runs, common)
    doubt = time_doubt(runs)
    notes = [
        *(statement_notes(study, stated, [run.task.record.started for run in runs])),
        *_document_notes(runs, common),
        *_machine_notes(runs, doubt),
        *_code_notes(runs),
        *_equal_notes(study, runs),
    ]
    looks = SeedPlan(looks=study.seeds)
    answers = {}
    for metric in study.metrics:
        values = figures.get(metric.name, {})
        control = values.get(study.control, {})
        found = answer(
            {arm.name: values.get(arm.name, {}) for arm in study.arms if arm.name != study.control},
            control,
            seeds=seeds,
            plan=looks,
            delta=metric.delta,
            lower_is_better=metric.better == "lower",
        )
        if metric.name in TIMES and doubt:
            found = [without_verdict(one, "times are no evidence, see above") for one in found]
        answers[metric.name] = tuple(found)
        reasons = {run.missing[metric.name] for run in runs if metric.name in run.missing}
        notes += [f"{metric.name}: {reason}" for reason in sorted(reasons)]
    return Comparison(
        name=plan.name,
        study=study,
        scale=plan.scale,
        runs=runs,
        absent=absent,
        figures=figures,
        answers=answers,
        documents=_document_answers(study, runs, common),
        time_doubt=doubt,
        notes=tuple(notes),
    )


def _read(
    study: Study, tasks: Iterable[TaskOnDisk]
) -> tuple[tuple[RunMeasures, ...], range, tuple[tuple[str, str], ...]]:
    """Return the finished runs, the study's seeds from 1 to the last, and what has no run."""
    by_arm: dict[str, dict[int, TaskOnDisk]] = {arm.name: {} for arm in study.arms}
    absent = []
    for task in tasks:
        arm, seed = task.record.arm, task.record.seed
        if arm in by_arm:
            by_arm[arm][seed] = task
        else:
            absent.append((f"{arm}, seed {seed}", "the study has no such arm any more"))
    # A seed that no arm has is missing too: nobody may choose among the seeds of a study.
    seeds = range(1, 1 + max((seed for of_arm in by_arm.values() for seed in of_arm), default=0))
    runs = []
    for arm, of_arm in by_arm.items():
        if not of_arm:
            absent.append((arm, "no task has run"))
            continue
        for seed in seeds:
            found = of_arm.get(seed)
            if found is None:
                absent.append((f"{arm}, seed {seed}", "no task has run"))
            elif found.record.state == "done":
                runs.append(measure(found))
            else:
                reason = f"{found.record.state}: {found.record.message}".rstrip(": ")
                absent.append((f"{arm}, seed {seed}", reason))
    return tuple(runs), seeds, tuple(absent)


def _figures(runs: Sequence[RunMeasures], common: CommonDocuments | None) -> dict[str, Figures]:
    """Return the values by metric, arm and seed; validation losses over common documents."""
    figures: dict[str, dict[str, dict[int, float]]] = {}
    for number, run in enumerate(runs):
        values = dict(run.values)
        if common is not None and common.keys:
            nats = float(common.nats[number].sum())
            values["valid_loss"] = nats / int(common.tokens[number].sum())
            size = int(common.bytes.sum())
            values["valid_bits_per_byte"] = nats / math.log(2) / size if size else math.nan
        for metric, value in values.items():
            figures.setdefault(metric, {}).setdefault(run.arm, {})[run.seed] = value
    return {metric: figures[metric] for metric in METRICS if metric in figures}


def _document_answers(
    study: Study, runs: Sequence[RunMeasures], common: CommonDocuments | None
) -> tuple[DocumentAnswer, ...]:
    if common is None or len(common.keys) < 2:
        return ()
    row = {(run.arm, run.seed): number for number, run in enumerate(runs)}
    answers = []
    for arm in study.arms:
        seeds = [seed for name, seed in row if name == arm.name and (study.control, seed) in row]
        if arm.name == study.control or not seeds:
            continue
        arm_nats = common.nats[[row[arm.name, seed] for seed in seeds]].mean(0)
        control_nats = common.nats[[row[study.control, seed] for seed in seeds]].mean(0)
        tokens = common.tokens[0]
        answers.append(
            DocumentAnswer(
                arm=arm.name,
                seeds=len(seeds),
                documents=len(common.keys),
                effective=effective_documents(tokens),
                per_token=document_interval(arm_nats, control_nats, tokens)
                if common.same_tokens
                else None,
                bits_per_byte=document_interval(
                    arm_nats / math.log(2), control_nats / math.log(2), common.bytes
                ),
            )
        )
    return tuple(answers)


def _document_notes(runs: Sequence[RunMeasures], common: CommonDocuments | None) -> list[str]:
    if not runs:
        return []
    if common is None:
        return [
            "Validation losses are as logged: a run has no sums by document "
            "(logging.validation_documents), so nothing shows that the documents are the same."
        ]
    if not common.keys:
        return [
            "No document is common to all runs: each loss is over the run's own documents, and "
            "part of a difference may be theirs."
        ]
    notes = []
    if len(common.keys) < common.of_all:
        notes.append(
            f"Validation losses are over the {len(common.keys):,} documents that all runs scored "
            f"alike, of {common.of_all:,}."
        )
    if not common.same_tokens:
        notes.append("Runs have other tokens for the same text: compare bits per byte.")
    if effective_documents(common.tokens[0]) < ENOUGH:
        notes.append(
            f"The common documents weigh like {effective_documents(common.tokens[0]):.0f} equal "
            f"ones; below {ENOUGH} the interval over documents is too narrow."
        )
    return notes


def time_doubt(runs: Sequence[RunMeasures]) -> str:
    """Return why times of runs are no evidence of speed; empty: nothing speaks against them."""
    for first, second in itertools.combinations(runs, 2):
        a, b = first.task.record, second.task.record
        known = first.host and a.started and a.ended and b.started and b.ended
        if known and first.host == second.host and a.started < b.ended and b.started < a.ended:
            return (
                f"tasks of the study shared a machine ({first.arm} seed {first.seed} and "
                f"{second.arm} seed {second.seed} on {first.host})"
            )
    unknown = [run for run in runs if run.load is None]
    if unknown:
        return f"nothing shows what else ran beside {len(unknown)} of the {len(runs)} runs"
    crowded = [(run.load, run) for run in runs if run.load and run.load.share_of_others > CROWDED]
    if not crowded:
        return ""
    load, run = max(crowded, key=lambda pair: pair[0].share_of_others)
    return (
        f"other processes kept {load.others:.1f} of {load.cores} cores busy while {run.arm} seed "
        f"{run.seed} trained"
    )


def _machine_notes(runs: Sequence[RunMeasures], doubt: str) -> list[str]:
    notes = [f"Times are no evidence: {doubt}."] if doubt else []
    hosts = sorted({run.host for run in runs})
    if len(hosts) > 1:
        named = ", ".join(host or "?" for host in hosts)
        notes.append(f"Times are of {len(hosts)} machines: {named}.")
    return notes


def _equal_notes(study: Study, runs: Sequence[RunMeasures]) -> list[str]:
    """Return a note on each arm that is the control to the last digit: its override does nothing.

    Losses and gradient norms of every logged step are compared.
    """

    def numbers(run: RunMeasures) -> list[list[float]]:
        return [run.curve(name)[1] for name in ("lm_loss", "grad_norm")]

    control = {run.seed: run for run in runs if run.arm == study.control}
    notes = []
    for arm in study.arms:
        pairs = [run for run in runs if run.arm == arm.name and run.seed in control]
        if arm.name == study.control or not pairs:
            continue
        if all(numbers(run)[0] and numbers(run) == numbers(control[run.seed]) for run in pairs):
            notes.append(
                f"{arm.name} is {study.control} to the last digit of every step: its override "
                "changes nothing in these runs."
            )
    return notes


def _code_notes(runs: Sequence[RunMeasures]) -> list[str]:
    commits = sorted({run.commit for run in runs})
    notes = []
    if len(commits) > 1:
        notes.append(f"The runs are of {len(commits)} states of the code: {', '.join(commits)}.")
    versions = {
        tuple(f"{name} {run.task.record.identity.get(name, '?')}" for name in PACKAGES)
        for run in runs
        if run.task.record.identity
    }
    if len(versions) > 1:
        sets = "; ".join(", ".join(one) for one in sorted(versions))
        notes.append(f"The runs are of {len(versions)} sets of packages: {sets}.")
    if any("+" in commit for commit in commits):
        notes.append("A run had uncommitted changes (+), so its commit does not give it again.")
    return notes
