"""The page about a corpus plan that has run: ``report/report.md`` with its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mellum2_megatron.common.files import atomic_directory
from mellum2_megatron.data.phase_record import read_phase
from mellum2_megatron.data.pipeline.graph import Graph
from mellum2_megatron.data.pipeline.summary import Funnel, counted, funnels, left_out_rows, needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#2563eb", "#f59e0b", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#db2777", "#65a30d")


def write_report(graph: Graph) -> Path:
    """Write the report of a plan that has run, and return its page.

    Raises:
        InputError: a stage has not ended, or a phase is not there.
    """
    ways = funnels(graph)
    packs = _packs(graph)
    records = [read_phase(graph.results, number + 1) for number in range(len(graph.plan.phases))]
    parts = [
        f"# Corpus {graph.plan.name}",
        f"Seed {graph.plan.seed}. Encoded with {graph.tokenizer['engine']}; tokenizer "
        f"{graph.tokenizer['sha256'][:12]} with {graph.tokenizer['vocab_size']:,} entries.",
        "## Documents",
        "![Documents that each step leaves](funnel.png)",
        *(_funnel(way) for way in ways),
    ]
    if rows := left_out_rows(graph):
        parts += [
            "Files and rows that are no document:",
            _table(("source", "number", "reason", "first"), rows),
        ]
    parts += [
        "## Lengths",
        "![Tokens of the documents](lengths.png)",
        "## Phases",
        "![Sources of each phase](phases.png)",
        _table(
            (
                "phase",
                "source",
                "share",
                "tokens",
                "passes so far",
                "FIM",
                "near-duplicates",
                "packs there",
            ),
            (
                (
                    need.phase,
                    need.source,
                    f"{need.share:.1f}%",
                    f"{need.needed:,}",
                    f"{need.passes:.3f} of {need.allowed:g}",
                    f"{need.fim:.0%}",
                    "-" if need.near_duplicates is None else f"{need.near_duplicates:,}",
                    f"{records[need.phase - 1].packs[need.source]:,}",
                )
                for need in needs(graph, counted(graph))
            ),
        ),
        "Near-duplicates: those that the phase drops; `-` where they are dropped for all phases "
        "at once, above.",
        "## Packs",
        _table(
            (
                "phase",
                "source",
                "split",
                "documents",
                "cut",
                "packs",
                "fill",
                "few unique",
                "FIM rate (bounds)",
                "PSM (bounds)",
            ),
            packs,
        ),
        "Rates lie between the bounds in 99.9% of fair draws. A pack with too few unique tokens is "
        "dropped (report §3.6).",
    ]
    if joined := _repositories(graph):
        parts += [
            "## Repository-level documents",
            _table(
                (
                    "phase",
                    "source",
                    "repositories",
                    "documents",
                    "files in them",
                    "files each",
                    "too long",
                    "PSM (bounds)",
                ),
                joined,
            ),
            "Files too long for a document beside the repository's name stay documents of their "
            "own.",
        ]
    target = graph.results / "report"
    with atomic_directory(target, overwrite=True) as folder:
        _draw_funnels(ways, folder / "funnel.png")
        _draw_lengths(graph, folder / "lengths.png")
        _draw_phases(graph, folder / "phases.png")
        (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return target / "report.md"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        # A file's name or a document's first words may hold the sign that ends a cell.
        cells = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _funnel(way: Funnel) -> str:
    rows: list[Sequence[Any]] = [("read", f"{way.documents:,}", "", "")]
    left = way.documents
    for step in way.steps:
        left -= step.documents
        share = step.documents / max(way.documents, 1)
        rows.append((step.name, f"{left:,}", f"-{step.documents:,} ({share:.1%})", step.example))
    rows.append(("training", f"{way.left:,}", f"{way.tokens:,} tokens", ""))
    rows.append(("validation", f"{way.valid:,}", "", ""))
    languages = ", ".join(f"{name} {count:,}" for name, count in list(way.languages.items())[:12])
    head = ("step", "documents left", "dropped", "first dropped")
    return f"### {way.source}\n\n{_table(head, rows)}\n\nLanguages: {languages or 'none'}."


def _packs(graph: Graph) -> list[Sequence[Any]]:
    """Return a row for each phase, source and split."""
    sums: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for task in graph.packs():
        key = (task.settings["phase"], task.source, task.settings["split"])
        sums.setdefault(key, []).append(task.manifest(graph.results))
    rows: list[Sequence[Any]] = []
    for (phase, source, split), manifests in sums.items():
        total = {
            name: sum(facts[name] for facts in manifests)
            for name in ("documents", "documents_cut", "packs", "padding", "packs_few_unique")
        }
        places = total["packs"] * graph.plan.phases[phase - 1].sequence_length
        fim = [facts["fim"] for facts in manifests if "fim" in facts]
        rows.append(
            (
                phase,
                source,
                split,
                f"{total['documents']:,}",
                f"{total['documents_cut']:,}",
                f"{total['packs']:,}",
                f"{1 - total['padding'] / places:.3%}" if places else "-",
                f"{total['packs_few_unique']:,}",
                *_rates(graph, phase, fim),
            )
        )
    return rows


def _repositories(graph: Graph) -> list[Sequence[Any]]:
    """Return a row for each phase and source whose files are joined by repository."""
    sums: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for task in graph.packs():
        if "range" in task.settings:
            facts = task.manifest(graph.results)["repository"]
            sums.setdefault((task.settings["phase"], task.source), []).append(facts)
    rows: list[Sequence[Any]] = []
    for (phase, source), tasks in sums.items():
        # A repository of several passes counts in each.
        total = {
            name: sum(facts[name] for facts in tasks)
            for name in ("repositories", "documents", "files", "files_too_long")
        }
        _, psm = _rates(graph, phase, [facts["fim"] for facts in tasks])
        each = total["files"] / max(total["documents"], 1)
        counts = (f"{total[name]:,}" for name in ("repositories", "documents", "files"))
        rows.append((phase, source, *counts, f"{each:.1f}", f"{total['files_too_long']:,}", psm))
    return rows


def _rates(graph: Graph, phase: int, fim: list[dict[str, Any]]) -> tuple[str, str]:
    from mellum2_megatron.data.tokens.fill_in_middle import FimCounts

    if not fim:
        return "-", "-"
    counts = FimCounts(
        eligible=sum(one["eligible"] for one in fim),
        psm=sum(one["psm"] for one in fim),
        spm=sum(one["spm"] for one in fim),
    )
    facts: dict[str, Any] = counts.report(graph.plan.phases[phase - 1].fim)

    def shown(name: str) -> str:
        low, high = facts[f"{name}_bounds"]
        return f"{facts[name]:.1%} ({low:.1%} to {high:.1%})"

    return shown("rate"), shown("psm_share")


def _axes(width: float, height: float) -> tuple[Any, Axes]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_funnels(ways: Sequence[Funnel], path: Path) -> None:
    figure, axes = _axes(9, 1.2 + 0.6 * len(ways))
    names = list(dict.fromkeys(step.name for way in ways for step in way.steps))
    for row, way in enumerate(ways):
        start = 0.0
        kept = way.left + way.valid
        bars = [("kept", kept, "#e5e7eb")]
        dropped = {step.name: step.documents for step in way.steps}
        bars += [
            (name, dropped.get(name, 0), _COLOURS[n % len(_COLOURS)])
            for n, name in enumerate(names)
        ]
        for name, number, colour in bars:
            share = 100 * number / max(way.documents, 1)
            axes.barh(row, share, left=start, color=colour, label=name if row == 0 else None)
            start += share
    axes.set_yticks(range(len(ways)), [way.source for way in ways])
    axes.set_xlabel("documents read (%)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=4, frameon=False)
    _save(figure, path)


def _draw_lengths(graph: Graph, path: Path) -> None:
    figure, axes = _axes(9, 4)
    edges = np.logspace(0, 7, 71)
    for number, name in enumerate(graph.plan.sources):
        counts = np.zeros(len(edges) - 1, dtype=np.int64)
        for task in graph.tokens:
            if task.source == name:
                offsets = np.load(task.folder(graph.results) / "offsets.npy")
                counts += np.histogram(np.diff(offsets), bins=edges)[0]
        axes.stairs(counts, edges, color=_COLOURS[number % len(_COLOURS)], label=name)
    for length in sorted({phase.sequence_length for phase in graph.plan.phases}):
        axes.axvline(length, color="#6b7280", linestyle=":", linewidth=1)
        axes.text(length, axes.get_ylim()[1], f" {length:,}", color="#6b7280", va="top")
    axes.set_xscale("log")
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.legend(frameon=False)
    _save(figure, path)


def _draw_phases(graph: Graph, path: Path) -> None:
    figure, axes = _axes(9, 1.2 + 0.6 * len(graph.plan.phases))
    for row, phase in enumerate(graph.plan.phases):
        start = 0.0
        for number, name in enumerate(graph.plan.sources):
            share = 100 * phase.mixture.get(name, 0) / sum(phase.mixture.values())
            colour = _COLOURS[number % len(_COLOURS)]
            axes.barh(row, share, left=start, color=colour, label=name if row == 0 else None)
            if share >= 4:
                text = f"{share:.0f}%"
                axes.text(start + share / 2, row, text, ha="center", va="center", color="white")
            start += share
    labels = [
        f"phase {number}, {phase.tokens:,} tokens"
        for number, phase in enumerate(graph.plan.phases, start=1)
    ]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("tokens (%)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=4, frameon=False)
    _save(figure, path)
