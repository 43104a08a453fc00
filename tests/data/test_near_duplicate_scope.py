"""Near-duplicates of web text within a phase: planted ones, against a comparison pair by pair."""

from __future__ import annotations

import hashlib
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mellum2_megatron.data.corpus.near_duplicates import later_ones, shared_keys
from mellum2_megatron.data.pipeline.graph import Graph
from mellum2_megatron.data.pipeline.plan_file import read_plan
from mellum2_megatron.data.pipeline.report import write_report
from mellum2_megatron.data.pipeline.run import run_plan
from mellum2_megatron.data.pipeline.selecting import VALID, place
from mellum2_megatron.data.pipeline.summary import needs
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.pack_files import PackShard, read_pack_folder
from tests.data.plan_inputs import write_plan

TWINS = 30


def page(seed: int) -> str:
    """Return lines of random letters; few of their 5-grams are in another page."""
    letters = np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyz"), (12, 6, 8))
    return "".join(" ".join("".join(word) for word in line) + ".\n" for line in letters)


PAGES = [page(seed) for seed in range(TWINS)]
TWIN = [text + "The end of the page was here.\n" for text in PAGES]
ALONE = [page(1000 + seed) for seed in range(20)]


def digest(text: str) -> int:
    """Hash of a document as packs hold it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


NAMES = {
    digest(text): (kind, number)
    for kind, texts in (("page", PAGES), ("twin", TWIN), ("alone", ALONE))
    for number, text in enumerate(texts)
}


def build(
    folder: Path,
    prepared: PreparedData,
    *,
    shard: int,
    reverse: bool = False,
    near_duplicates: dict[str, Any] | None = None,
    **source: Any,
) -> Graph:
    texts = [*PAGES, *ALONE, *TWIN]
    folder.mkdir()
    for number in range(5):
        lines = [json.dumps({"text": text}) for text in texts[number::5]]
        name = f"{9 - number if reverse else number}.jsonl"
        (folder / name).write_text("\n".join(lines[:: -1 if reverse else 1]) + "\n")
    phases = [
        {"tokens": 15_000, "mixture": {"web": 100}, "sequence_length": 512, "unique_tokens": 5},
        {"tokens": 22_000, "mixture": {"web": 100}, "sequence_length": 512, "unique_tokens": 5},
    ]
    web = {"kind": "text", "inputs": [folder.name], "filters": {"ProseShape": None}, **source}
    plan = write_plan(
        folder.parent,
        prepared.tokenizer_dir,
        sources={"web": web},
        phases=phases,
        shard_bytes=shard,
        valid_share=0.1,
        near_duplicates=near_duplicates or {},
    )
    graph = Graph.of(read_plan(plan), folder.parent / f"results-{folder.name}")
    run_plan(graph, workers=1, progress=False)
    return graph


def found(graph: Graph, phase: int, split: str = "train") -> set[tuple[str, int]]:
    """Return the documents of a phase's packs."""
    documents: set[int] = set()
    folder = read_pack_folder(graph.results / f"phase-{phase}" / "web", "x")
    for prefix in folder.prefixes(split):
        documents |= set(PackShard(prefix).all_pieces().documents.tolist())
    return {NAMES[one] for one in documents}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, prepared: PreparedData) -> Graph:
    return build(tmp_path_factory.mktemp("scope") / "web", prepared, shard=10_000)


def test_twins_stay_in_different_phases_and_not_in_one(graph: Graph) -> None:
    first, second = found(graph, 1), found(graph, 2)
    across = 0
    for number in range(TWINS):
        pair = {("page", number), ("twin", number)}
        assert not pair <= first
        assert not pair <= second
        across += bool(pair & first and pair & second and pair & first != pair & second)
    # Of the phases' places in the source, one of two pairs falls on either side.
    assert across > 2
    valid = found(graph, 1, "valid")
    assert valid
    assert valid == found(graph, 2, "valid")
    for kind, number in valid:
        other = ({"page": "twin", "twin": "page"}.get(kind), number)
        assert other not in first | second | valid


def test_a_phase_drops_nothing_else(graph: Graph) -> None:
    """Its documents, one by one in the order of their places; the first of two twins stays."""
    plan = graph.plan
    hashes = {text: hashlib.sha256(text.encode()).digest()[:16] for text in (*PAGES, *TWIN, *ALONE)}
    places = {
        NAMES[digest(text)]: int(
            place(np.frombuffer(one, np.uint8).reshape(1, 16), plan.seed, plan.valid_share)[0]
        )
        for text, one in hashes.items()
    }
    for allotment in graph.allotments()[0]:
        seen: set[int] = {
            number for (kind, number), at in places.items() if at == VALID and kind != "alone"
        }
        expected: set[tuple[str, int]] = set()
        for part in allotment.parts:
            for (kind, number), at in sorted(places.items(), key=lambda item: item[1]):
                if not part.first <= at < part.last:
                    continue
                if kind == "alone" or number not in seen or (kind, number) in expected:
                    expected.add((kind, number))
                if kind != "alone":
                    seen.add(number)
        assert found(graph, allotment.phase) == expected


def test_counts_are_told(graph: Graph) -> None:
    facts = graph.selects["web"].manifest(graph.results)
    told = {one["phase"]: one["near_duplicates"]["documents"] for one in facts["phases"]}
    assert all(told.values())
    assert [need.near_duplicates for need in needs(graph, {"web": 1.0})] == [told[1], told[2]]
    assert f"| {told[1]} |" in write_report(graph).read_text()


def test_survivors_depend_on_neither_order_nor_number_of_tasks(
    graph: Graph, prepared: PreparedData, tmp_path: Path
) -> None:
    other = build(tmp_path / "web", prepared, reverse=True, shard=1 << 20)
    assert len(other.tokens) == 1 < len(graph.tokens)
    for phase in (1, 2):
        assert found(other, phase) == found(graph, phase)
        assert found(other, phase, "valid") == found(graph, phase, "valid")


def test_whole_source_and_exact_comparison(
    graph: Graph, prepared: PreparedData, tmp_path: Path
) -> None:
    """With the scope of code no twin is in another phase; comparing exactly finds the same."""
    whole = build(tmp_path / "web", prepared, shard=1 << 20, near_duplicate_scope="source")
    everything = found(whole, 1) | found(whole, 2) | found(whole, 1, "valid")
    for number in range(TWINS):
        assert len(everything & {("page", number), ("twin", number)}) <= 1
    assert not whole.plan.sources["web"].compares_phases
    assert graph.plan.sources["web"].compares_phases
    exact = build(tmp_path / "exact", prepared, shard=1 << 20, near_duplicates={"verify": True})
    for phase in (1, 2):
        assert found(exact, phase) == found(graph, phase)


def test_later_ones_against_every_pair() -> None:
    generator = np.random.default_rng(2)
    keys = generator.integers(0, 40, (30, 3)).astype(np.uint64) + np.array([0, 100, 200], np.uint64)
    ranks = generator.permutation(30)
    expected = set()
    for one, other in combinations(range(30), 2):
        if set(keys[one].tolist()) & set(keys[other].tolist()):
            expected.add(one if ranks[one] > ranks[other] else other)
    shared, owners = shared_keys(keys.ravel(), np.repeat(np.arange(30), 3))
    assert set(later_ones(shared, owners, ranks[owners]).tolist()) == expected
    assert 0 < len(expected) < 30
