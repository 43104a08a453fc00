"""Stages `exact` and `select` in parts and blocks, against plain Python that holds everything."""

from __future__ import annotations

import errno
import json
import multiprocessing
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.select_memory import SCOPES, make_task, measure
from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.values import to_plain
from mellum2_megatron.data.corpus.near_duplicates import NearDuplicateSettings
from mellum2_megatron.data.pipeline import partitions, row_file
from mellum2_megatron.data.pipeline.documents import drop_exact
from mellum2_megatron.data.pipeline.ledger import BUCKETS, take
from mellum2_megatron.data.pipeline.selecting import DROPPED, VALID, place, select
from mellum2_megatron.data.pipeline.tasks import Result, Task, run_task

BANDS = 3
SIZES = [(1 << 22, 1 << 17), (60, 11), (17, 5)]
"""Records of a part and rows of a block: everything at once, and less."""


def write_source(results: Path, seed: int) -> list[str]:
    """Write four shards, one of them empty, with equal hashes and planted near-duplicates."""
    generator = np.random.default_rng(seed)
    texts = [generator.integers(1, 30, 40, dtype=np.int32) for _ in range(8)]
    names = []
    for shard, count in enumerate((60, 0, 45, 80)):
        names.append(f"tokens/{shard}")
        folder, gathered = results / names[-1], results / f"repositories/{shard}"
        folder.mkdir(parents=True)
        gathered.mkdir(parents=True)
        hashes = generator.integers(0, 256, (count, 16), dtype=np.uint8)
        hashes[: count // 6] = hashes[:1]
        lengths = generator.integers(10, 40, count)
        ids = [texts[generator.integers(8)][:length] for length in lengths]
        np.save(folder / "hashes.npy", hashes)
        np.save(folder / "offsets.npy", np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))
        np.concatenate([*ids, np.zeros(0, np.int32)]).astype("<i4").tofile(folder / "ids.bin")
        keys = generator.integers(0, 150, (count, BANDS)) * BANDS + np.arange(BANDS)
        np.save(folder / "keys.npy", keys.astype(np.uint64) << np.uint64(40))
        owned = generator.integers(0, 2, count) * generator.integers(1, 1 << 62, count)
        np.save(gathered / "keys.npy", owned.astype(np.uint64))
    return names


def load(results: Path, names: list[str], file: str) -> NDArray[Any]:
    return np.concatenate([np.load(results / name / file) for name in names])


def alike(results: Path, names: list[str], verify: bool) -> list[tuple[int, int]]:
    """Return every two documents with a key in common, of similar text if ``verify``."""
    keys = [set(row) for row in load(results, names, "keys.npy").tolist()]
    texts = []
    for name in names:
        offsets = np.load(results / name / "offsets.npy")
        ids = np.fromfile(results / name / "ids.bin", "<i4").tolist()
        texts += [ids[a : b - 1] for a, b in pairwise(offsets)]
    grams = [{tuple(one[n : n + 5]) for n in range(len(one) - 4)} for one in texts]

    def similar(one: int, other: int) -> bool:
        return len(grams[one] & grams[other]) >= 0.7 * len(grams[one] | grams[other])

    return [
        (one, other)
        for one, other in combinations(range(len(keys)), 2)
        if keys[one] & keys[other] and (not verify or similar(one, other))
    ]


def plain_select(results: Path, names: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the buckets of all documents by file name, and the tokens of buckets."""
    hashes = load(results, names, "hashes.npy")
    offsets = [np.load(results / name / "offsets.npy") for name in names]
    lengths = [int(length) for one in offsets for length in np.diff(one)]
    buckets = place(hashes, settings["seed"], settings["valid_share"]).tolist()
    if settings.get("repositories"):
        owned = load(
            results, [name.replace("tokens", "repositories") for name in names], "keys.npy"
        )
        buckets = [
            own >> 52 if own and bucket != VALID else bucket
            for own, bucket in zip(owned.tolist(), buckets, strict=True)
        ]
    numbers = range(len(buckets))
    in_turn = sorted(numbers, key=lambda n: (hashes[n].tobytes(), n))
    rank = {n: at for at, n in enumerate(in_turn)}
    pairs = alike(results, names, settings["near_duplicates"]["settings"]["verify"])

    def histogram(kept: list[bool]) -> NDArray[np.int64]:
        tokens = np.zeros(BUCKETS, dtype=np.int64)
        for n in numbers:
            if kept[n] and buckets[n] != VALID:
                tokens[buckets[n]] += lengths[n]
        return tokens

    def chosen(kept: list[bool]) -> list[int]:
        return [bucket if stays else DROPPED for bucket, stays in zip(buckets, kept, strict=True)]

    if "phases" not in settings:
        group = list(numbers)
        for one, other in pairs:
            old, new = group[one], group[other]
            group = [new if label == old else label for label in group]
        best = {label: n for n in reversed(in_turn) for label in (group[n],)}
        kept = [best[group[n]] == n for n in numbers]
        return {"buckets": chosen(kept), "histogram": histogram(kept)}
    made: dict[str, Any] = {}
    rows, ever, begin = [], [False] * len(buckets), (0, 0)
    for phase, needed in settings["phases"]:
        walk = {
            n: (-1 if buckets[n] == VALID else (buckets[n] - begin[1]) % BUCKETS, rank[n])
            for n in numbers
        }
        later = {max(pair, key=walk.__getitem__) for pair in pairs}
        kept = [n not in later for n in numbers]
        ever = [before or now for before, now in zip(ever, kept, strict=True)]
        rows.append(histogram(kept))
        most = int(rows[-1].sum() * settings["epochs"])
        begin = take(rows[-1], min(needed, most), begin)[2]
        made[f"phase-{phase}"] = chosen(kept)
    return {**made, "buckets": chosen(ever), "histogram": np.stack(rows)}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("repositories", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_select_equals_plain_python_at_every_size(
    scope: str, repositories: bool, verify: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    names = write_source(results, seed=3)
    near = NearDuplicateSettings(bands=BANDS, verify=verify)
    settings: dict[str, Any] = {"seed": 5, "valid_share": 0.1}
    settings["near_duplicates"] = {"settings": to_plain(near), "minhash": "none"}
    inputs = [Result(name=name, stage="tokens", source="code") for name in names]
    if repositories:
        settings["repositories"] = True
        inputs += [
            Result(name=f"repositories/{n}", stage="repositories", source="code") for n in range(4)
        ]
    if scope == "phase":
        settings |= {"phases": [[1, 1200], [3, 900]], "epochs": 2.0}
    task = Task(
        stage="select", label="x", version=1, work=select, settings=settings, inputs=tuple(inputs)
    )
    expected = plain_select(results, names, settings)
    facts = []
    for number, (records, rows) in enumerate(SIZES):
        monkeypatch.setattr(partitions, "RECORDS_IN_MEMORY", records)
        monkeypatch.setattr(row_file, "BLOCK_ROWS", rows)
        folder = tmp_path / str(number)
        folder.mkdir()
        facts.append(json.dumps(select(task, results, folder)))
        assert (np.load(folder / "histogram.npy") == expected["histogram"]).all()
        for name in expected.keys() - {"histogram"}:
            files = sorted(folder.glob(f"{name}-*.npy"))
            assert len(files) == 4
            assert np.concatenate([np.load(file) for file in files]).tolist() == expected[name]
        # Nothing else: the temporary files are gone.
        assert len(list(folder.iterdir())) == 4 * (len(expected) - 1) + 1
    assert len(set(facts)) == 1
    dropped = json.loads(facts[0])["near_duplicates"]["documents"]
    assert dropped == expected["buckets"].count(DROPPED)
    assert 0 < dropped < 185


def test_exact_equals_plain_python_at_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    names = write_source(results, seed=4)
    first: set[bytes] = set()
    expected: list[list[int]] = []
    for name in names:
        hashes = np.load(results / name / "hashes.npy")
        if len(hashes):
            hashes[-3:] = np.arange(48, dtype=np.uint8).reshape(3, 16)  # in every shard
            np.save(results / name / "hashes.npy", hashes)
        expected.append([])
        for n, one in enumerate(hashes):
            if one.tobytes() in first:
                expected[-1].append(n)
            first.add(one.tobytes())
    task = Task(
        stage="exact",
        label="all",
        version=1,
        work=drop_exact,
        settings={},
        inputs=tuple(
            Result(name=name, stage="documents", source=f"source-{number // 2}")
            for number, name in enumerate(names)
        ),
    )
    for records, rows in SIZES:
        monkeypatch.setattr(partitions, "RECORDS_IN_MEMORY", records)
        monkeypatch.setattr(row_file, "BLOCK_ROWS", rows)
        folder = tmp_path / f"{records}"
        folder.mkdir()
        facts = drop_exact(task, results, folder)
        files = sorted(folder.iterdir())
        assert [np.load(file).tolist() for file in files] == expected
        counts = [len(rows) for rows in expected]
        assert facts == {
            "documents": 185,
            "duplicates": {"source-0": sum(counts[:2]), "source-1": sum(counts[2:])},
        }
    assert all(expected[number] for number in (0, 2, 3))


@pytest.mark.parametrize("scope", SCOPES)
def test_memory_for_a_document(scope: str, tmp_path: Path) -> None:
    """A million more take 4 bytes each and little else; their hashes and keys would take 40."""
    counts = (200_000, 1_400_000)
    tasks = [make_task(tmp_path / f"{n}", n, bands=2, scope=scope) for n in counts]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        less, more = pool.apply(measure, (tmp_path, tasks, 1 << 16, 1 << 15))
    growth = (more["peak"] - less["peak"]) / (more["documents"] - less["documents"])
    assert growth < 14, (less, more)
    assert 0.01 < more["near_duplicates"] / more["documents"] < 0.15


def test_full_disk_is_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path, 5000, bands=3, scope="source")
    for one in task.inputs:
        (one.folder(tmp_path) / "manifest.json").write_text('{"files": {}}')
    added = []

    def add(self: partitions.Partitions, parts: NDArray[Any], **columns: NDArray[Any]) -> None:
        if "rank" in columns:
            raise OSError(errno.ENOSPC, "No space left on device")
        added.append(len(parts))
        original(self, parts, **columns)

    original = partitions.Partitions.add
    monkeypatch.setattr(partitions.Partitions, "add", add)
    with pytest.raises(WorkError, match=r"stage select, 5000: .*No space left"):
        run_task(task, tmp_path)
    assert added
    assert not list((tmp_path / "select").iterdir())
    monkeypatch.undo()
    assert run_task(task, tmp_path)
    assert not list(task.folder(tmp_path).glob("temporary-*"))
