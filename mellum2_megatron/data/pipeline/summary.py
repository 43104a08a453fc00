"""A plan in figures: tokens for each source and phase, and what every stage dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mellum2_megatron.data.corpus.left_out import REASONS
from mellum2_megatron.data.pipeline.graph import Graph
from mellum2_megatron.data.pipeline.ledger import Shortage


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Documents that one step dropped.

    Attributes:
        name: filter or stage.
        documents, bytes: what it dropped; bytes are 0 where a stage counts tokens.
        example: first document, with the reason.
    """

    name: str
    documents: int
    bytes: int = 0
    example: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Funnel:
    """The way of one source's documents.

    Attributes:
        source: name of the source.
        documents, bytes: documents read.
        steps: steps that dropped some, in order.
        left: documents for training.
        tokens: tokens of these.
        valid: documents for validation.
        languages: documents that passed the filters, by language.
    """

    source: str
    documents: int
    bytes: int
    steps: tuple[Step, ...]
    left: int
    tokens: int
    valid: int
    languages: dict[str, int]


def funnels(graph: Graph) -> list[Funnel]:
    """Return the funnel of every source.

    Raises:
        InputError: a stage up to ``select`` has not ended.
    """
    made = []
    exact = graph.exact.manifest(graph.results)
    for name, select in graph.selects.items():
        read = [t.manifest(graph.results) for t in graph.documents if t.source == name]
        encoded = [t.manifest(graph.results) for t in graph.tokens if t.source == name]
        counts = select.manifest(graph.results)
        languages: dict[str, int] = {}
        for facts in read:
            for language, count in facts["languages"].items():
                languages[language] = languages.get(language, 0) + count["documents"]
        steps = [
            *_dropped(read),
            Step(name="exact duplicates", documents=exact["duplicates"].get(name, 0)),
            *_dropped(encoded),
            Step(name="near-duplicates", documents=counts["near_duplicates"]["documents"]),
        ]
        made.append(
            Funnel(
                source=name,
                documents=sum(facts["documents_read"] for facts in read),
                bytes=sum(facts["bytes_read"] for facts in read),
                steps=tuple(step for step in steps if step.documents),
                left=counts["documents"],
                tokens=counts["tokens"],
                valid=counts["valid_documents"],
                languages=dict(sorted(languages.items(), key=lambda item: -item[1])),
            )
        )
    return made


def _dropped(manifests: list[dict[str, Any]]) -> Iterator[Step]:
    """Yield the steps of several results of one stage, filter by filter."""
    names = dict.fromkeys(name for facts in manifests for name in facts["dropped"])
    for name in names:
        found = [facts["dropped"][name] for facts in manifests if name in facts["dropped"]]
        yield Step(
            name=name,
            documents=sum(one["documents"] for one in found),
            bytes=sum(one["bytes"] for one in found),
            example=found[0]["example"],
        )


def left_out_rows(graph: Graph) -> list[tuple[str, int, str, str]]:
    """Return source, count, reason in words and first example of all that was never a document."""
    rows: dict[tuple[str, str], tuple[int, str]] = {}
    for name, tally in graph.left_out.items():
        for reason, count in tally.counts.items():
            rows[name, reason] = (count, tally.first[reason])
    for task in graph.documents:
        for reason, facts in task.manifest(graph.results)["left_out"].items():
            count, first = rows.get((task.source, reason), (0, facts["first"]))
            rows[task.source, reason] = (count + facts["count"], first)
    return [
        (source, count, REASONS[reason], first) for (source, reason), (count, first) in rows.items()
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """One source in one phase, as far as it is known.

    Attributes:
        phase: number of the phase.
        source: name of the source.
        share: percentage of the phase.
        needed: tokens that the phase trains on.
        available: tokens of one pass; counted, or estimated from a sample.
        passes: passes over the source after this phase, all phases so far together.
        allowed: largest number of passes.
        missing: tokens that the source lacks for all phases up to this one.
        fim: share of its documents that FIM reorders.
        joined: share of its repositories whose files are joined to documents.
        near_duplicates: documents of the phase that it drops as near-duplicates; None where they
            are dropped for all phases at once, or where nothing has run.
    """

    phase: int
    source: str
    share: float
    needed: int
    available: float
    passes: float
    allowed: float
    missing: int
    fim: float
    joined: float
    near_duplicates: int | None


def needs(graph: Graph, available: dict[str, float]) -> list[Need]:
    """Return every source's part in every phase, given its tokens of one pass."""
    rows = []
    so_far = dict.fromkeys(graph.plan.sources, 0)
    for number, phase in enumerate(graph.plan.phases, start=1):
        total = sum(phase.mixture.values())
        for name, share in phase.mixture.items():
            source = graph.plan.sources[name]
            so_far[name] += phase.tokens_of(name)
            tokens = available[name]
            applies = source.kind == "code" or not phase.fim.code_only
            rows.append(
                Need(
                    phase=number,
                    source=name,
                    share=100 * share / total,
                    needed=phase.tokens_of(name),
                    available=tokens,
                    passes=so_far[name] / tokens if tokens else float("inf"),
                    allowed=source.epochs,
                    missing=max(0, int(so_far[name] - tokens * source.epochs)),
                    fim=phase.fim.rate if applies else 0.0,
                    joined=phase.repository[name].rate if name in phase.repository else 0.0,
                    near_duplicates=_near_duplicates(graph, name, number),
                )
            )
    return rows


def shortages(graph: Graph, available: dict[str, float]) -> list[Shortage]:
    """Return the sources that have too few tokens, given their tokens of one pass."""
    found = []
    for name, source in graph.plan.sources.items():
        needed = sum(phase.tokens_of(name) for phase in graph.plan.phases)
        if needed > available[name] * source.epochs:
            found.append(
                Shortage(
                    source=name,
                    available=int(available[name]),
                    needed=needed,
                    epochs=source.epochs,
                )
            )
    return found


def _near_duplicates(graph: Graph, source: str, phase: int) -> int | None:
    select = graph.selects[source]
    if not select.done(graph.results):
        return None
    for facts in select.manifest(graph.results).get("phases", ()):
        if facts["phase"] == phase:
            return int(facts["near_duplicates"]["documents"])
    return None


def counted(graph: Graph) -> dict[str, float]:
    """Return the tokens of one pass of every source, counted by stage ``select``.

    Where phases drop near-duplicates of their own, of the phase that has the fewest.
    """
    return {
        name: float(task.manifest(graph.results)["tokens"]) for name, task in graph.selects.items()
    }
