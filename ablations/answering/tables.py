"""The tables of a report: the same rows for Markdown, HTML and the log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ablations.answering.comparison import Comparison
from ablations.answering.run_measures import RunMeasures, count_skips, count_spikes
from ablations.answering.scaling import SMALLEST, ScalingFit, SizedRun, fit_scaling
from ablations.answering.verdicts import Answer
from ablations.asking.study import METRICS

HEALTH = ("expert_load", "grad_norm")
"""Metrics that every report shows, with those of the study."""

STAGE = ("mtp_loss", "mtp_acceptance", "loss_early", "loss_late", "fim_exact_match", "needle")
"""Metrics of one stage or part of the model; a report shows those that its runs have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of texts.

    Attributes:
        title: heading; empty: none.
        header: titles of the columns.
        rows: cells, as wide as the header.
        notes: sentences below it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def markdown_table(table: Table) -> list[str]:
    """Return the lines of a table, its notes below."""
    lines = [
        f"| {' | '.join(_cell(cell) for cell in row)} |"
        for row in (table.header, ("---",) * len(table.header), *table.rows)
    ]
    return [*lines, *(["", *table.notes] if table.notes else [])]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def report_tables(comparison: Comparison) -> list[Table]:
    """Return the tables of a report, in its order."""
    tables = [answer_table(comparison), _cost_table(comparison)]
    tables += [_metric_table(comparison, metric.name) for metric in comparison.study.metrics[1:]]
    if stage := [name for name in STAGE if name in comparison.figures]:
        tables.append(_stage_table(comparison, stage))
    if comparison.documents:
        tables.append(_document_table(comparison))
    scaling = _scaling_table(comparison)
    if scaling is not None:
        tables.append(scaling)
    if comparison.absent:
        tables.append(
            Table(title="Not in this report", header=("task", "reason"), rows=comparison.absent)
        )
    return tables


def answer_table(comparison: Comparison) -> Table:
    """Return the table of the deciding metric."""
    study = comparison.study
    table = _metric_table(comparison, study.metrics[0].name)
    expected = study.claim.expected if study.claim else {}
    claims = [
        "control" if arm.name == study.control else expected.get(arm.name, "") for arm in study.arms
    ]
    return Table(
        title="Answer",
        header=(*table.header, "published claim"),
        rows=tuple((*row, claim) for row, claim in zip(table.rows, claims, strict=True)),
        notes=table.notes,
    )


def _metric_table(comparison: Comparison, name: str) -> Table:
    study = comparison.study
    metric = study.metric(name)
    answers = {one.arm: one for one in comparison.answers[name]}
    rows = []
    for arm in study.arms:
        values = list(comparison.figures.get(name, {}).get(arm.name, {}).values())
        rows.append((arm.name, str(len(values)), _mean_sd(values), *_answer(answers.get(arm.name))))
    looks = ", ".join(map(str, study.seeds))
    notes = [
        f"{name}: {METRICS[name]}; {metric.better} is better. Delta {metric.delta:g}, looks at "
        f"{looks} seeds. Differences are paired by seed, arm less {study.control}."
    ]
    if study.metrics[0].name != name:
        notes.append("This metric does not decide; Holm covers its arms, not the metrics.")
    notes += [f"{one.arm}: {one.note}." for one in answers.values() if one.note]
    return Table(
        title=f"Also compared: {name}",
        header=("arm", "seeds", f"{name} (sd)", "difference [95% t]", "[plan]", "verdict"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _answer(one: Answer | None) -> tuple[str, str, str]:
    if one is None:
        return "", "", ""
    interval = "" if one.interval is None else f" {one.interval}"
    difference = "" if math.isnan(one.difference) else f"{one.difference:+.4f}{interval}"
    return difference, "" if one.plan_interval is None else str(one.plan_interval), one.word


def _mean_sd(values: Sequence[float]) -> str:
    if not values:
        return ""
    sd = f" ({statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{sd}"


def _mean(comparison: Comparison, arm: str, metric: str) -> float | None:
    values = comparison.figures.get(metric, {}).get(arm, {}).values()
    return statistics.fmean(values) if values else None


def ratio(comparison: Comparison, arm: str, metric: str) -> float | None:
    """Return the geometric mean over paired seeds of arm over control; None without a pair."""
    figures = comparison.figures.get(metric, {})
    own, control = figures.get(arm, {}), figures.get(comparison.study.control, {})
    pairs = [own[seed] / control[seed] for seed in own if control.get(seed)]
    return statistics.geometric_mean(pairs) if pairs and min(pairs) > 0 else None


def _cost_table(comparison: Comparison) -> Table:
    rows = []
    # A column is copied without the notes on top of the report.
    shown = "no evidence ({:.2f})" if comparison.time_doubt else "{:.3f}"
    for arm in comparison.study.arms:
        runs = comparison.of_arm(arm.name)
        ratios = [
            ratio(comparison, arm.name, name) for name in ("step_seconds", "tokens_per_second")
        ]
        means = [_mean(comparison, arm.name, name) for name in HEALTH]
        rows.append(
            (
                arm.name,
                *("" if one is None else shown.format(one) for one in ratios),
                *_sizes(runs),
                *("" if one is None else f"{one:.3f}" for one in means),
                str(sum(count_spikes(run.records) for run in runs)) if runs else "",
                str(sum(count_skips(run.records) for run in runs)) if runs else "",
                ", ".join(dict.fromkeys(run.commit for run in runs)),
            )
        )
    return Table(
        title="Cost and health",
        header=(
            "arm",
            "step time, ratio",
            "tokens/s, ratio",
            "parameters",
            "active",
            "FLOPs",
            "expert load",
            "grad norm",
            "spikes",
            "skips",
            "commit",
        ),
        rows=tuple(rows),
        notes=(
            f"Ratios to {comparison.study.control}, paired by seed. FLOPs of one whole training, "
            "with the MTP head where there is one. Spikes and skips are sums over the seeds.",
        ),
    )


def _stage_table(comparison: Comparison, names: Sequence[str]) -> Table:
    figures = comparison.figures
    return Table(
        title="By stage",
        header=("arm", *(f"{name} (sd)" for name in names)),
        rows=tuple(
            (
                arm.name,
                *(_mean_sd(list(figures[name].get(arm.name, {}).values())) for name in names),
            )
            for arm in comparison.study.arms
        ),
        notes=(
            *(f"{name}: {METRICS[name]}." for name in names),
            "Means over the seeds, without a verdict unless the study compares by them.",
        ),
    )


def _sizes(runs: Sequence[RunMeasures]) -> tuple[str, str, str]:
    if not runs:
        return "", "", ""
    run = runs[0].run
    tokens = run.schedule.train_samples - run.data.first_sample
    flops = tokens * run.data.sequence_length * runs[0].flops_per_token
    architecture = run.architecture
    return (
        f"{architecture.num_parameters():,}",
        f"{architecture.num_active_parameters():,}",
        f"{flops:.3g}",
    )


def _document_table(comparison: Comparison) -> Table:
    return Table(
        title="Over documents",
        header=("arm", "seeds", "documents", "nats a token [95%]", "bits a byte [95%]"),
        rows=tuple(
            (
                one.arm,
                str(one.seeds),
                f"{one.documents:,}",
                "" if one.per_token is None else str(one.per_token),
                str(one.bits_per_byte),
            )
            for one in comparison.documents
        ),
        notes=(
            "With these checkpoints, on other documents of the same kind. No verdict: another seed "
            "may move both arms.",
        ),
    )


def scaling_runs(comparison: Comparison) -> list[SizedRun]:
    """Return the runs with a finite validation loss, by active parameters."""
    losses: Mapping[str, Mapping[int, float]] = comparison.figures.get("valid_loss", {})
    sized = []
    for run in comparison.runs:
        loss = losses.get(run.arm, {}).get(run.seed, math.nan)
        if math.isfinite(loss) and loss > 0:
            samples = run.run.schedule.train_samples - run.run.data.first_sample
            sized.append(
                SizedRun(
                    parameters=run.run.architecture.num_active_parameters(),
                    tokens=samples * run.run.data.sequence_length,
                    loss=loss,
                )
            )
    return sized


def _scaling_table(comparison: Comparison) -> Table | None:
    runs = scaling_runs(comparison)
    sizes = {run.parameters for run in runs}
    if len(sizes) < SMALLEST:
        return None
    fit: ScalingFit = fit_scaling(runs)
    intervals = [
        "one run a size" if one is None else str(one)
        for one in (fit.irreducible_interval, fit.size_interval)
    ]
    return Table(
        title="Over sizes: L = E + A N^-a D^-b",
        header=("E [95%]", "A", "a [95%]", "b", "largest size against the others' fit"),
        rows=(
            (
                f"{fit.irreducible:.4f} {intervals[0]}",
                f"{fit.factor:.4g}",
                f"{fit.size_exponent:.3f} {intervals[1]}",
                f"{fit.token_exponent:.3f}" if fit.separate else "0, not separate from N",
                f"{math.expm1(fit.held_out):+.2%}",
            ),
        ),
        notes=(
            f"N: active parameters, {len(sizes)} sizes, {len(runs)} runs. Arms that differ in more "
            "than their size do not lie on one line.",
        ),
    )
