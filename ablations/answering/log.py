"""The log of ablations: a dated entry for each report, negative results as well.

Entries are made from reports, and only appended. ``ablations/LOG.md`` is the project's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from ablations.answering.comparison import Comparison
from ablations.answering.tables import answer_table, markdown_table
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import LARGEST_TEXT, read_bytes, write_text

HEAD = """\
# Log of ablations

Each entry is made by `mellum2 ablate log` from the files of finished runs, and none is edited. An
arm that is worse, and a question that stays undecided, is an entry too.
"""


def append_entry(comparison: Comparison, file: Path, *, now: datetime | None = None) -> str:
    """Append the entry of a report to a log, made if missing; return the entry.

    Args:
        comparison: the study's runs, compared.
        file: the log.
        now: time of the entry; None (default): now.

    Raises:
        InputError: no arm has an answer, or the log has an entry of these very runs.
    """
    deciding = comparison.answers[comparison.study.metrics[0].name]
    if not any(one.look for one in deciding):
        raise InputError(
            f"{comparison.name} at scale {comparison.scale}",
            rule=f"no arm has the {comparison.study.seeds[0]} seeds of the first look",
            fix=f"mellum2 ablate run {comparison.name} --scale {comparison.scale}",
        )
    entry = log_entry(comparison, now or datetime.now(UTC))
    text = HEAD
    if file.is_file():
        text = read_bytes(file, largest=LARGEST_TEXT).decode("utf-8")
    if digest(comparison) in text:
        raise InputError(
            f"{file}",
            rule=f"it has an entry of these {len(comparison.runs)} runs already",
            fix="run more seeds, or leave the entry as it is",
        )
    write_text(file, f"{text.rstrip()}\n\n{entry}")
    return entry


def digest(comparison: Comparison) -> str:
    """Return 12 hexadecimal digits of the runs of a report, by their tasks' hashes."""
    tasks = sorted((run.arm, run.seed, run.task.record.hash) for run in comparison.runs)
    content = repr((comparison.name, comparison.scale, tasks))
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def log_entry(comparison: Comparison, now: datetime) -> str:
    """Return an entry: motivation, change, result, verdict and evidence."""
    study = comparison.study
    metric = study.metrics[0]
    motivation = [study.question]
    if study.claim is not None:
        motivation.append(f"Published: {study.claim.text} ({study.claim.source}).")
    changes = []
    for arm in study.arms:
        words = [f"`{word}`" for word in arm.words(comparison.scale)]
        data = arm.data.get(comparison.scale) if isinstance(arm.data, Mapping) else arm.data
        if data is not None:
            words.append(f"data `{data.name}`")
        note = f" ({arm.note})" if arm.note else ""
        changes.append(f"{arm.name}: {' '.join(words) or 'the base'}{note}")
    expected = study.claim.expected if study.claim else {}
    verdicts = []
    for one in comparison.answers[metric.name]:
        word = one.word.replace("delta", f"{metric.delta:g}")
        claim = expected.get(one.arm)
        against = "" if claim is None else f"; published: {claim}"
        note = f" ({one.note})" if one.note else ""
        verdicts.append(
            f"- {one.arm}: **{word}** than {study.control}{note}{against}"
            if one.word in ("better", "worse")
            else f"- {one.arm}: **{word}**{note}{against}"
        )
    seeds = sorted({run.seed for run in comparison.runs})
    commits = sorted({run.commit for run in comparison.runs})
    limits = [*comparison.notes, *([study.note] if study.note else [])]
    if comparison.scale == "tiny":
        limits.append("Tiny scale: the verdict holds at this size alone.")
    limits += [f"No result: {task} ({reason})." for task, reason in comparison.absent]
    return "\n".join(
        [
            f"## {now:%Y-%m-%d} {comparison.name}, {comparison.scale}",
            "",
            f"**Motivation.** {' '.join(motivation)}",
            "",
            f"**Change.** {'; '.join(changes)}. Control: {study.control}.",
            "",
            "**Result.**",
            "",
            *markdown_table(answer_table(comparison)),
            "",
            "**Verdict.**",
            "",
            *verdicts,
            "",
            f"**Evidence.** {len(comparison.runs)} runs, seeds {', '.join(map(str, seeds))}, "
            f"commit {', '.join(commits)}, runs {digest(comparison)}.",
            *(["", f"**Limits.** {' '.join(limits)}"] if limits else []),
            "",
        ]
    )
