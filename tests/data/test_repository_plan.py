"""Repository-level documents of a plan: every file once, related ones together, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.pipeline import repositories
from mellum2_megatron.data.pipeline.graph import Graph
from mellum2_megatron.data.pipeline.ledger import BUCKETS, Part
from mellum2_megatron.data.pipeline.plan import Plan
from mellum2_megatron.data.pipeline.plan_file import read_plan
from mellum2_megatron.data.pipeline.report import write_report
from mellum2_megatron.data.pipeline.repository_packing import KeyRange, key_ranges
from mellum2_megatron.data.pipeline.run import run_plan
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.fill_in_middle import Sentinels, restore
from mellum2_megatron.data.tokens.pack_files import PackShard, PieceFlag, read_pack_folder
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer
from tests.cli.runner import mellum2
from tests.data.plan_inputs import content, module, write_plan

LENGTH = 2048
TEXTS: dict[tuple[str, str], str] = {
    # Three repositories in rows, and one as a folder. `app/n.py` imports `lib/deep/n.py`.
    **{
        (f"owner/r{number}", path): text + module(1000 * number + place)
        for number in range(3)
        for place, (path, text) in enumerate(
            [
                *((f"app/m{n}.py", f"from lib.deep.m{n} import x\n") for n in range(10)),
                *((f"lib/deep/m{n}.py", "") for n in range(10)),
            ]
        )
    },
    **{("clone", f"src/f{n}.py"): module(7000 + n) for n in range(6)},
}
LONE = [module(8000 + n) for n in range(8)]
LONG = "\n\n".join(module(9000 + n) for n in range(12))


def write_inputs(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": text, "repo_name": name, "path": path, "language": "Python"}
        for (name, path), text in TEXTS.items()
        if name != "clone"
    ]
    rows += [{"text": text, "path": f"lone{n}.py"} for n, text in enumerate(LONE)]
    rows.append({"text": LONG, "repo_name": "owner/r0", "path": "other/long.py"})
    # Files of one repository lie in several input files, in no order.
    np.random.default_rng(3).shuffle(rows)  # type: ignore[arg-type]
    for number in range(4):
        lines = [json.dumps(row) for row in rows[number::4]]
        (folder / f"rows{number}.jsonl").write_text("\n".join(lines) + "\n")
    for (name, path), text in TEXTS.items():
        if name == "clone":
            file = folder / "tree" / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


def phase(**changes: Any) -> dict[str, Any]:
    return {
        "tokens": 30_000,
        "mixture": {"code": 100},
        "sequence_length": LENGTH,
        "fim": {"rate": 0.5},
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("repositories")
    write_inputs(made)
    return made


def plan_of(folder: Path, prepared: PreparedData, *phases: dict[str, Any]) -> Plan:
    code = {
        "kind": "code",
        "inputs": ["tree", *(f"rows{number}.jsonl" for number in range(4))],
        "near_duplicates": False,
        "repository_folders": 1,
    }
    return read_plan(
        write_plan(
            folder,
            prepared.tokenizer_dir,
            sources={"code": code},
            phases=list(phases),
            valid_share=0.05,
            shard_bytes=12_000,
        )
    )


@pytest.fixture(scope="module")
def ran(folder: Path, prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A pass of plain documents, then most of one with repositories joined."""
    plan = plan_of(
        folder, prepared, phase(tokens=9_000), phase(repository={"code": {"length": 1500}})
    )
    graph = Graph.of(plan, tmp_path_factory.mktemp("results"))
    run_plan(graph, workers=1, progress=False)
    return graph


def documents(folder: Path, split: str = "train") -> list[tuple[int, np.ndarray]]:
    """Return flags and ids of every document in a source's packs, cut ones left out."""
    found = []
    for prefix in read_pack_folder(folder, "x").prefixes(split):
        shard = PackShard(prefix)
        for pack in range(len(shard)):
            pieces = shard.pieces(pack)
            for start, length, flags in zip(
                pieces.starts, pieces.lengths, pieces.flags, strict=True
            ):
                if not flags & (PieceFlag.CUT | PieceFlag.CONTINUED):
                    found.append((int(flags), np.array(shard.tokens(pack)[start : start + length])))
    return found


class Reader:
    """Takes a repository-level document apart again, by its tokens alone."""

    def __init__(self, graph: Graph) -> None:
        self.tokenizer = load_tokenizer(Path(graph.plan.tokenizer))
        self.special = {**graph.tokenizer["special"], **graph.tokenizer["repository"]}
        self.eod = graph.tokenizer["eod"]
        self.sentinels = Sentinels(
            prefix=self.special["fim_prefix"],
            middle=self.special["fim_middle"],
            suffix=self.special["fim_suffix"],
        )

    def text(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def files(self, ids: np.ndarray) -> tuple[str, list[tuple[str, str]]]:
        """Return the repository, and path and text of each file; the last is the target."""
        assert ids[0] == self.special["reponame"]
        assert ids[-1] == self.eod
        head, *parts = np.split(ids[:-1], np.flatnonzero(ids == self.special["filename"]))
        files = []
        for number, part in enumerate(parts):
            role, first = 0, part
            if number == len(parts) - 1:
                # The sentinels come after the line of the path.
                begin = np.flatnonzero(np.isin(part, list(vars_of(self.sentinels))))[0]
                role, plain = restore(part[begin:], self.sentinels)
                assert role
                first = np.concatenate((part[:begin], plain))
            path, text = self.text(first[1:]).split("\n", 1)
            files.append((path, text))
        name = self.text(head[1:])
        assert name.endswith("\n")
        return name[:-1], files


def vars_of(sentinels: Sentinels) -> tuple[int, int, int]:
    return sentinels.prefix, sentinels.middle, sentinels.suffix


def test_documents_hold_the_files_of_their_repository(ran: Graph) -> None:
    """Un-permuted, each file's text is the input's; a file is in one document of a pass."""
    reader, seen = Reader(ran), Counter[tuple[str, str]]()
    sizes = []
    lone = 0
    for flags, ids in documents(ran.results / "phase-2" / "code"):
        if not flags & PieceFlag.REPOSITORY:
            _, plain = restore(ids[:-1], reader.sentinels)
            assert reader.text(plain) in LONE
            lone += 1
            continue
        assert flags & (PieceFlag.PSM | PieceFlag.SPM)
        assert len(ids) <= 1500
        name, files = reader.files(ids)
        for path, text in files:
            assert text == TEXTS[name, path]
            seen[name, path] += 1
        sizes.append(len(files))
    assert lone
    assert max(sizes) > 3
    assert {name for name, _ in seen} > {"clone"}
    # 1.6 passes at most, so some are seen twice.
    assert set(seen.values()) <= {1, 2}


def test_related_files_come_last_and_the_farthest_first(ran: Graph) -> None:
    """Beside the target stands what it imports or is imported by, then its own folder."""
    reader, checked = Reader(ran), 0
    for flags, ids in documents(ran.results / "phase-2" / "code"):
        if not flags & PieceFlag.REPOSITORY:
            continue
        name, files = reader.files(ids)
        if name == "clone":
            continue
        paths = [Path(path) for path, _ in files]
        *related, target = paths
        partner = [path.name == target.name for path in related]
        if any(partner):
            assert partner.index(True) == len(related) - 1
            related.pop()
        beside = [path.parent == target.parent for path in related]
        assert beside == sorted(beside)
        checked += any(partner) and 0 < sum(beside) < len(beside)
    assert checked


def test_the_ledger_counts_every_token_once(ran: Graph) -> None:
    """Tokens of plain and joined files of a phase are those of its buckets; counts are told."""
    _, second = ran.allotments()[0]
    joined = taken = single = 0
    for task in ran.packs():
        facts = task.manifest(ran.results)
        if task.settings["phase"] != 2 or task.settings["split"] != "train":
            continue
        if "repository" in facts:
            told = facts["repository"]
            taken += told["tokens_taken"]
            joined += told["files"]
            assert told["fim"]["psm"] + told["fim"]["spm"] == told["documents"]
            assert facts["documents"] == told["documents"] + told["files_too_long"]
        else:
            part = Part(**task.settings["part"])
            for number, tokens in zip(task.settings["shards"], task.inputs[1::3], strict=True):
                select = ran.selects["code"].folder(ran.results)
                buckets = np.load(select / f"buckets-{number:05}.npy")
                keys = np.load(ran.repositories[number].folder(ran.results) / "keys.npy")
                chosen = (buckets >= part.first) & (buckets < part.last) & (keys == 0)
                offsets = np.load(tokens.folder(ran.results) / "offsets.npy")
                single += int(np.diff(offsets)[chosen].sum())
    assert joined
    assert taken + single == second.taken
    page = write_report(ran).read_text()
    assert "Repository-level documents" in page
    assert f"| {joined:,} |" in page


def test_a_repository_is_whole_in_a_phase(ran: Graph) -> None:
    """Its training files share a bucket, and validation takes files by their text."""
    places: dict[int, set[int]] = {}
    for number, task in enumerate(ran.repositories):
        keys = np.load(task.folder(ran.results) / "keys.npy")
        select = ran.selects["code"].folder(ran.results)
        buckets = np.load(select / f"buckets-{number:05}.npy")
        for key, bucket in zip(keys.tolist(), buckets.tolist(), strict=True):
            if key and bucket < BUCKETS:
                places.setdefault(key, set()).add(bucket)
    assert len(places) == 4
    assert all(len(found) == 1 for found in places.values())
    assert documents(ran.results / "phase-2" / "code", "valid")
    for flags, _ in documents(ran.results / "phase-2" / "code", "valid"):
        assert not flags & PieceFlag.REPOSITORY


def test_any_number_of_workers_gives_the_same_bytes(ran: Graph, tmp_path: Path) -> None:
    """The stages that this file is about, with two workers."""
    for stage in ("documents", "exact", "tokens"):
        shutil.copytree(ran.results / stage, tmp_path / "two" / stage)
    graph = Graph.of(ran.plan, tmp_path / "two")
    run_plan(graph, workers=2, progress=False)
    expected = content(ran.results)
    assert content(graph.results) == {
        name: digest for name, digest in expected.items() if not name.startswith("report/")
    }


def test_small_runs_and_frames_give_the_same_files(
    ran: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorted in runs of a few files, and read in parts of few tokens."""
    monkeypatch.setattr(repositories, "_RUN_BYTES", 2000)
    monkeypatch.setattr(repositories, "_FRAME_BYTES", 600)
    select = ran.selects["code"].folder(ran.results)
    shards = len(ran.repositories)
    buckets = [select / f"buckets-{number:05}.npy" for number in range(shards)]
    made = [tmp_path / f"{number}" for number in range(shards)]
    for task, place in zip(ran.repositories, made, strict=True):
        place.mkdir()
        repositories.gather(task, ran.results, place)
        frames = np.load(place / "frames.npy")
        assert len(np.unique(frames["run"])) > 1
    whole = [task.folder(ran.results) for task in ran.repositories]
    expected = list(repositories.read_repositories(whole, buckets, 0, 1 << 64, 10**9))
    assert list(repositories.read_repositories(made, buckets, 0, 1 << 64, 10**9)) == expected
    for _, _, files in expected:
        assert [one.path for one in files] == sorted(one.path for one in files)
    parts = list(repositories.read_repositories(made, buckets, 0, 1 << 64, 300))
    assert max(number for _, number, _ in parts) > 2
    joined: dict[int, list[repositories.StoredFile]] = {}
    for key, _, files in parts:
        joined.setdefault(key, []).extend(files)
    assert joined == {key: files for key, _, files in expected}


def test_ranges_cover_each_key_once() -> None:
    tokens = np.random.default_rng(1).integers(0, 30, BUCKETS)
    tokens[100], tokens[101], tokens[4095] = 950, 0, 340
    ranges = key_ranges(tokens, Part(epoch=0, first=17, last=BUCKETS), 300)
    bounds = [one.bounds() for one in ranges]
    assert bounds[0][0] == KeyRange(first=17, last=18).bounds()[0]
    assert bounds[-1][1] == 1 << 64
    assert all(one[1] == other[0] for one, other in pairwise(bounds))
    for one in ranges:
        if one.slices == 1:
            assert tokens[one.first : one.last].sum() <= 300
    assert sum(one.slices > 1 for one in ranges) == 4 + 2


def test_part_of_the_repositories(
    ran: Graph, folder: Path, prepared: PreparedData, tmp_path: Path
) -> None:
    """With a rate, the files of the other repositories are documents of their own."""
    plan = plan_of(
        folder,
        prepared,
        phase(tokens=20_000, repository={"code": {"rate": 0.5}}, fim={"rate": 0, "psm_share": 1}),
    )
    graph = Graph.of(plan, shutil.copytree(ran.results, tmp_path / "results"))
    run_plan(graph, workers=1, progress=False)
    reader = Reader(graph)
    joined, alone = set(), set()
    names = {text: name for (name, _), text in TEXTS.items()}
    for flags, ids in documents(graph.results / "phase-1" / "code"):
        if flags & PieceFlag.REPOSITORY:
            assert flags & PieceFlag.PSM
            joined.add(reader.files(ids)[0])
        elif (text := reader.text(ids[:-1])) in names:
            alone.add(names[text])
    assert joined
    assert alone
    assert not joined & alone


def test_inspect_shows_repositories(ran: Graph) -> None:
    shown = mellum2("data", "inspect", ran.results / "phase-2" / "code").out
    counted = sum(
        bool(flags & PieceFlag.REPOSITORY)
        for flags, _ in documents(ran.results / "phase-2" / "code")
    )
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("repository")]
    assert line.split()[-1] == str(counted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repository": {"cod": {}}}, r"phases\.1\.repository\.cod.*did you mean 'code'"),
        ({"repository": {"code": {"length": 4096}}}, r"repository\.code\.length=4096.*2048"),
        ({"repository": {"code": {"length": 3}}}, r"repository\.code\.length=3.*64 tokens"),
        ({"repository": {"code": {"rate": 0}}}, r"repository\.code\.rate=0"),
        ({"repository": {"code": {"leng": 3}}}, "did you mean 'phases.1.repository.code.length'"),
        ({"repository": ["code"]}, r"phases\.1\.repository.*must be a mapping"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(
    changes: dict[str, Any], message: str, folder: Path, prepared: PreparedData
) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(folder, prepared, phase(**changes))


def test_a_tokenizer_without_the_tokens_is_refused(
    folder: Path, prepared: PreparedData, tmp_path: Path
) -> None:
    value = json.loads((prepared.tokenizer_dir / "tokenizer.json").read_text())
    value["added_tokens"] = [
        token for token in value["added_tokens"] if token["content"] != "<reponame>"
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    plan = read_plan(
        write_plan(
            folder,
            tmp_path,
            sources={"code": {"kind": "code", "inputs": ["tree"]}},
            phases=[phase(repository={"code": {}})],
        )
    )
    with pytest.raises(InputError, match="it has no reponame token, and a phase joins"):
        Graph.of(plan, tmp_path / "none")
