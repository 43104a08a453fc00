"""A study's report, made from the files of its runs alone: Markdown, CSV, pictures, one HTML page.

The same files give the same report, to the byte. Nothing in it is edited by hand.
"""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path

from ablations.answering.comparison import Comparison
from ablations.answering.figures import draw_curves, draw_forest
from ablations.answering.tables import Table, markdown_table, ratio, report_tables
from mellum2_megatron.common.files import write_text

REPORT = "report"
"""Folder of a study's reports, beside the folders of its arms."""

METHOD = (
    "Verdicts come from paired t tests over seeds, on the looks that the study states, with Holm "
    "over its arms. Two intervals: of 95% if nobody had looked before, and of the plan, which "
    "holds over all looks. At 3 seeds no permutation test reaches p < 0.25, and a bootstrap over "
    "seeds is far too narrow. Method, assumptions and error rates: docs/ablation_statistics.md."
)

_PICTURES = {"forest.png": "differences with intervals", "curves.png": "loss curves"}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;"
    "color:#1f2430}table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.25rem .7rem;"
    "border-bottom:1px solid #e5e7eb;text-align:left}p.note{color:#6b7280;margin:.2rem 0}"
    "img{max-width:100%}"
)


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write all files of a report into a folder, made if missing; return the Markdown's path."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_forest(comparison, folder / "forest.png")
    draw_curves(comparison, folder / "curves.png")
    tables = report_tables(comparison)
    write_text(folder / "report.csv", _answers_csv(comparison))
    write_text(folder / "runs.csv", _runs_csv(comparison))
    write_text(folder / "report.html", _html(comparison, tables, folder))
    write_text(folder / "report.md", markdown(comparison, tables))
    return folder / "report.md"


def markdown(comparison: Comparison, tables: Sequence[Table]) -> str:
    """Return the report as Markdown."""
    parts = [f"# {comparison.name}: {comparison.study.question}", "", *_facts(comparison)]
    parts += ["", f"![{_PICTURES['forest.png']}](forest.png)", ""]
    for table in tables:
        parts += [f"## {table.title}", "", *markdown_table(table), ""]
    parts += [f"![{_PICTURES['curves.png']}](curves.png)", "", "## Method", "", METHOD]
    return "\n".join(parts) + "\n"


def _facts(comparison: Comparison) -> list[str]:
    study = comparison.study
    lines = [f"Scale {comparison.scale}, control {study.control}."]
    if study.claim is not None:
        lines.append(f"Published claim: {study.claim.text} ({study.claim.source}).")
    if comparison.scale == "tiny":
        lines.append(
            "A tiny run shows that an arm works and is wired; its verdict holds at this size alone."
        )
    if study.note:
        lines.append(study.note)
    lines += comparison.notes
    if comparison.absent:
        lines.append(f"{len(comparison.absent)} of its tasks have no result, see the end.")
    return [f"- {line}" for line in lines]


def _answers_csv(comparison: Comparison) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        "metric arm seeds look difference sd low high plan_low plan_high p p_equivalent verdict "
        "expected step_seconds_ratio tokens_per_second_ratio time_doubt note".split()
    )
    expected = comparison.study.claim.expected if comparison.study.claim else {}
    for metric, answers in comparison.answers.items():
        for one in answers:
            bounds: list[str] = []
            for interval in (one.interval, one.plan_interval):
                bounds += (
                    ["", ""] if interval is None else [repr(interval.low), repr(interval.high)]
                )
            ratios = [
                ratio(comparison, one.arm, name) for name in ("step_seconds", "tokens_per_second")
            ]
            writer.writerow(
                [
                    metric,
                    one.arm,
                    len(one.seeds),
                    "" if one.look is None else one.look,
                    repr(one.difference),
                    repr(one.sd),
                    *bounds,
                    repr(one.p),
                    repr(one.p_equivalent),
                    one.word,
                    expected.get(one.arm, ""),
                    *("" if value is None else repr(value) for value in ratios),
                    comparison.time_doubt,
                    one.note,
                ]
            )
    return stream.getvalue()


def _runs_csv(comparison: Comparison) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    metrics = list(comparison.figures)
    writer.writerow(["arm", "seed", *metrics, "commit", "host", "hash"])
    for run in comparison.runs:
        values = [comparison.figures[name].get(run.arm, {}).get(run.seed) for name in metrics]
        writer.writerow(
            [
                run.arm,
                run.seed,
                *("" if value is None else repr(value) for value in values),
                run.commit,
                run.host,
                run.task.record.hash,
            ]
        )
    return stream.getvalue()


def _html(comparison: Comparison, tables: Sequence[Table], folder: Path) -> str:
    """Return one page that needs no other file."""
    title = html.escape(f"{comparison.name}: {comparison.study.question}")

    def picture(name: str) -> str:
        data = base64.b64encode((folder / name).read_bytes()).decode("ascii")
        return f'<img alt="{_PICTURES[name]}" src="data:image/png;base64,{data}">'

    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
        f"<style>{_STYLE}</style><h1>{title}</h1><ul>",
        *(f"<li>{html.escape(line.removeprefix('- '))}</li>" for line in _facts(comparison)),
        "</ul>",
        picture("forest.png"),
    ]
    for table in tables:
        parts.append(f"<h2>{html.escape(table.title)}</h2><table>")
        for tag, row in (("th", table.header), *(("td", row) for row in table.rows)):
            cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</table>")
        parts += [f'<p class="note">{html.escape(note)}</p>' for note in table.notes]
    parts += [picture("curves.png"), f"<h2>Method</h2><p>{html.escape(METHOD)}</p></html>"]
    return "\n".join(parts) + "\n"
