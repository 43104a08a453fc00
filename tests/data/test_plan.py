"""A corpus plan from sources to packs: the same bytes however it is run, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import apply_overrides
from mellum2_megatron.data.feed.sources import check_amounts, check_data
from mellum2_megatron.data.phase_record import PHASE_FILE, read_phase
from mellum2_megatron.data.pipeline import encoding, row_file
from mellum2_megatron.data.pipeline.graph import STAGES, Graph
from mellum2_megatron.data.pipeline.packing import _diverse, _Totals
from mellum2_megatron.data.pipeline.plan import Plan
from mellum2_megatron.data.pipeline.plan_file import read_plan
from mellum2_megatron.data.pipeline.run import run_plan
from mellum2_megatron.data.pipeline.summary import counted, funnels, left_out_rows, needs
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.best_fit_packing import PackOrder
from mellum2_megatron.data.tokens.fill_in_middle import Sentinels, restore
from mellum2_megatron.data.tokens.pack_files import PackShard, PieceFlag, read_pack_folder
from mellum2_megatron.data.tokens.pack_writer import PieceTable
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer, tokenizer_hash
from mellum2_megatron.recipes import recipe
from tests.data.plan_inputs import LENGTH, content, module, rich, write_inputs, write_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prepared: PreparedData) -> Path:
    made = tmp_path_factory.mktemp("plan")
    write_inputs(made)
    return made


@pytest.fixture(scope="module")
def plan(folder: Path, prepared: PreparedData) -> Plan:
    return read_plan(write_plan(folder, prepared.tokenizer_dir))


@pytest.fixture(scope="module")
def ran(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The plan, run in this process."""
    graph = Graph.of(plan, tmp_path_factory.mktemp("results"))
    run_plan(graph, workers=1, progress=False)
    return graph


def test_any_number_of_workers_and_stops_give_the_same_bytes(
    plan: Plan, ran: Graph, tmp_path: Path
) -> None:
    graph = Graph.of(plan, tmp_path / "two")
    for stage in STAGES[:3]:
        run_plan(graph, stage=stage, workers=2, progress=False)
    # Half of a stage's results are lost, as after a kill.
    for task in graph.tokens[::2]:
        for file in task.folder(graph.results).iterdir():
            file.unlink()
        task.folder(graph.results).rmdir()
    run_plan(graph, workers=2, progress=False)
    assert content(graph.results) == content(ran.results)


def test_a_second_run_changes_nothing_and_a_new_phase_packs_only(
    plan: Plan, ran: Graph, folder: Path, prepared: PreparedData, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in ran.results.glob("*/*-*/manifest.json")}
    run_plan(ran, workers=1, progress=False)
    after = {path: path.stat().st_mtime_ns for path in ran.results.glob("*/*-*/manifest.json")}
    assert before == after
    other = read_plan(
        write_plan(
            folder,
            prepared.tokenizer_dir,
            phases=[{"tokens": 5000, "mixture": {"code": 100}, "sequence_length": LENGTH}],
        )
    )
    graph = Graph.of(other, ran.results)
    assert all(task.done(ran.results) for stage in STAGES[:4] for task in graph.tasks(stage))
    assert graph.selects["code"].done(ran.results)
    # Web text is compared within its phases, which are others now.
    assert not graph.selects["web"].done(ran.results)
    run_plan(graph, stage="select", workers=1, progress=False)
    assert not any(
        task.done(ran.results) for task in graph.packs() if task.settings["split"] == "train"
    )


def test_pieces_may_be_sorted_in_the_same_packs(
    ran: Graph, folder: Path, prepared: PreparedData
) -> None:
    def pieces_of(order: str) -> list[list[tuple[int, int]]]:
        phase: dict[str, Any] = {"tokens": 5000, "mixture": {"code": 100}, "sequence_length": 512}
        if order != "random":
            phase["piece_order"] = order
        path = write_plan(folder, prepared.tokenizer_dir, phases=[phase])
        graph = Graph.of(read_plan(path), ran.results)
        packed = []
        run_plan(graph, stage="select", workers=1, progress=False)
        run_plan(graph, stage="packs", workers=1, progress=False)
        for task in graph.packs():
            for facts in task.manifest(graph.results)["shards"]:
                shard = PackShard(task.folder(graph.results) / facts["name"])
                for pack in range(len(shard)):
                    pieces = shard.pieces(pack)
                    packed.append(
                        list(
                            zip(pieces.lengths.tolist(), pieces.documents.tolist(), strict=True),
                        )
                    )
        return packed

    before = pieces_of("random")
    assert any(sorted(pack, reverse=True) != pack for pack in before)
    for order, falling in (("longest_first", True), ("shortest_first", False)):
        after = pieces_of(order)
        assert [sorted(pack) for pack in after] == [sorted(pack) for pack in before]
        for pack in after:
            lengths = [length for length, _ in pack]
            assert lengths == sorted(lengths, reverse=falling)


def test_faults_and_duplicates_are_dropped_and_told(ran: Graph) -> None:
    code, web = funnels(ran)
    dropped = {step.name: step for step in code.steps}
    assert dropped["Parses"].documents == 1
    assert dropped["Parses"].example.startswith("broken.py: line 1: ")
    assert dropped["LineLength"].example == "minified.py: line of 3,006 bytes"
    assert dropped["exact duplicates"].documents == 1
    assert dropped["near-duplicates"].documents == 1
    assert code.documents == 30 + 4 + 20
    assert code.left + code.valid == code.documents - sum(step.documents for step in code.steps)
    assert web.documents == 25
    assert code.languages["python"] == code.documents - 2
    left_out = {(source, reason) for source, _, reason, _ in left_out_rows(ran)}
    assert ("code", "not UTF-8") in left_out


def test_packs_hold_every_document_of_their_part_once(ran: Graph, prepared: PreparedData) -> None:
    """The texts decoded from packs, FIM undone, are the input texts."""
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    special = ran.tokenizer["special"]
    sentinels = Sentinels(
        prefix=special["fim_prefix"], middle=special["fim_middle"], suffix=special["fim_suffix"]
    )
    inputs = {module(seed) for seed in (*range(30), *range(100, 120))}
    inputs.add(module(1) + "\n# the end\n")
    complete = reordered = 0
    for phase in (1, 2):
        folder = read_pack_folder(ran.results / f"phase-{phase}" / "code", "x")
        for prefix in folder.prefixes("train"):
            shard = PackShard(prefix)
            for pack in range(len(shard)):
                pieces = shard.pieces(pack)
                for start, length, flag in zip(
                    pieces.starts, pieces.lengths, pieces.flags, strict=True
                ):
                    if flag & (PieceFlag.CUT | PieceFlag.CONTINUED):
                        continue
                    ids = np.array(shard.tokens(pack)[start : start + length])
                    assert ids[-1] == ran.tokenizer["eod"]
                    role, plain = restore(ids[:-1], sentinels)
                    if phase == 2:
                        assert flag & (PieceFlag.PSM | PieceFlag.SPM)
                    complete += 1
                    reordered += bool(role)
                    text = tokenizer.decode(plain.tolist(), skip_special_tokens=False)
                    assert text in inputs
                    if phase == 2:
                        # Cut between tokens: they are the text's own.
                        assert plain.tolist() == tokenizer.encode(text).ids
    assert complete > 10
    assert reordered > 5


def fim_pieces(folder: Path, split: str) -> int:
    """Number of reordered pieces in a source's packs."""
    shards = [PackShard(prefix) for prefix in read_pack_folder(folder, "x").prefixes(split)]
    flags = [shard.pieces(pack).flags for shard in shards for pack in range(len(shard))]
    return int((np.concatenate(flags) & (PieceFlag.PSM | PieceFlag.SPM) > 0).sum())


def test_fim_is_where_the_plan_wants_it(ran: Graph) -> None:
    """All sources in phase 1, code alone in phase 2, and no validation document."""
    assert fim_pieces(ran.results / "phase-1" / "web", "train")
    assert fim_pieces(ran.results / "phase-2" / "code", "train")
    assert not fim_pieces(ran.results / "phase-2" / "web", "train")
    for phase in ("phase-1", "phase-2"):
        for source in ("web", "code"):
            assert not fim_pieces(ran.results / phase / source, "valid")


def test_packs_of_few_tokens_are_dropped_and_told() -> None:
    """Three packs of two pieces; the middle one repeats one token."""
    tokens = np.concatenate((np.arange(20), np.full(20, 7), np.arange(30, 50)))
    ten = np.full(6, 10)
    table = PieceTable(
        tokens=tokens,
        offsets=np.arange(0, 60, 10),
        lengths=ten,
        flags=np.zeros(6, dtype=np.uint8),
        sources=np.zeros(6, dtype=np.uint16),
        documents=np.arange(6, dtype=np.uint64),
    )
    order = PackOrder(pieces=np.array([1, 0, 2, 3, 5, 4]), starts=np.array([0, 2, 4, 6]))
    totals = _Totals()
    kept = _diverse(order, table, 20, totals, "train-00000")
    assert kept.pieces.tolist() == [1, 0, 5, 4]
    assert kept.starts.tolist() == [0, 2, 4]
    assert totals.few_unique == 1
    assert totals.example == "train-00000 before packs were dropped, 1: 1 unique tokens"


def test_a_phase_without_enough_packs_is_refused(
    folder: Path, prepared: PreparedData, ran: Graph
) -> None:
    phases = [
        {
            "tokens": 5000,
            "mixture": {"code": 100},
            "sequence_length": LENGTH,
            "unique_tokens": 361,  # one more than the tokenizer has
        }
    ]
    graph = Graph.of(
        read_plan(write_plan(folder, prepared.tokenizer_dir, phases=phases)), ran.results
    )
    before = read_phase(ran.results, 1)
    with pytest.raises(WorkError, match=r"needs 10 sequences of code, and there are 0: \d+ packs"):
        run_plan(graph, workers=1, progress=False)
    assert read_phase(ran.results, 1) == before


def test_stock_megatron_reads_the_packs(ran: Graph) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    folder = read_pack_folder(ran.results / "phase-1" / "web", "x")
    dataset = IndexedDataset(str(folder.prefixes("train")[0]))
    shard = PackShard(folder.prefixes("train")[0])
    assert len(dataset) == len(shard)
    for pack in range(len(shard)):
        assert (dataset[pack] == shard.tokens(pack)).all()
        assert len(dataset[pack]) == LENGTH


def test_phases_hold_what_the_plan_says(ran: Graph) -> None:
    for number, tokens in ((1, 12_000), (2, 8_000)):
        record = read_phase(ran.results, number)
        assert record.samples == -(-tokens // LENGTH)
        assert sum(record.shares.values()) == pytest.approx(100)
        assert set(record.packs) == {"code", "web"}
    rows = {(need.phase, need.source): need for need in needs(ran, counted(ran))}
    assert rows[1, "code"].needed == 8400
    assert rows[2, "code"].passes > rows[1, "code"].passes
    assert rows[2, "web"].fim == 0
    assert rows[2, "code"].fim == 1


def test_training_and_validation_share_no_document(ran: Graph) -> None:
    seen: dict[str, set[int]] = {"train": set(), "valid": set()}
    for phase in (1, 2):
        for source in ("code", "web"):
            folder = read_pack_folder(ran.results / f"phase-{phase}" / source, "x")
            for split, documents in seen.items():
                for prefix in folder.prefixes(split):
                    shard = PackShard(prefix)
                    for pack in range(len(shard)):
                        documents |= set(shard.pieces(pack).documents.tolist())
    assert seen["train"]
    assert seen["valid"]
    assert not seen["train"] & seen["valid"]


def test_a_run_takes_a_phase_by_folder_and_number(ran: Graph) -> None:
    base = recipe("mellum2_tiny_pretrain")
    overrides = [
        f"data.path={ran.results}",
        "data.phase=1",
        f"data.sequence_length={LENGTH}",
        "schedule.train_samples=24",
        "schedule.warmup_samples=8",
        "schedule.decay_samples=8",
        "logging.eval_iterations=1",
    ]
    run = apply_overrides(base, overrides)
    data = check_data(run)
    assert [(source.name, round(source.weight)) for source in data.train] == [
        ("web", 30),
        ("code", 70),
    ]
    assert data.document_attention
    assert any("0.9" in note or "epochs" in note for note in check_amounts(run, data))
    more = apply_overrides(run, ["schedule.train_samples=32"])
    with pytest.raises(InputError, match="it holds 24 sequences, and the run trains on 32"):
        check_amounts(more, check_data(more))
    # A step of 16 sequences may begin in the phase and end behind it.
    step = apply_overrides(more, ["schedule.batch_schedule=[[0,8],[16,16]]"])
    assert check_amounts(step, check_data(step))
    with pytest.raises(InputError, match=r"there is no .*phase-3.* packed are 1, 2 phases"):
        check_data(apply_overrides(run, ["data.phase=3"]))
    without = apply_overrides(run, ["data.phase=null"])
    keys = rf"data\.path={ran.results} data\.phase"
    with pytest.raises(InputError, match=rf"its phases .1, 2.*{keys}=1"):
        check_data(without)
    inside = f"data.path={ran.results}/phase-2"
    with pytest.raises(InputError, match=rf"use {keys}=2"):
        check_data(apply_overrides(without, [inside]))


def test_phases_of_two_versions_of_a_plan_are_refused(ran: Graph, tmp_path: Path) -> None:
    """A kill between the renames of two phases leaves them so."""
    plan = tmp_path / "plan"
    for number in (1, 2):
        (plan / f"phase-{number}").mkdir(parents=True)
        shutil.copy(ran.results / f"phase-{number}" / PHASE_FILE, plan / f"phase-{number}")
    assert read_phase(plan, 1).content == read_phase(plan, 2).content != ""
    record = plan / "phase-2" / PHASE_FILE
    record.write_text(record.read_text().replace(read_phase(plan, 2).content, "0" * 64))
    for number in (1, 2):
        with pytest.raises(InputError, match=f"phase-{3 - number} is of another version"):
            read_phase(plan, number)


def test_a_phase_that_fails_leaves_all_phases_as_they_were(
    folder: Path, prepared: PreparedData, ran: Graph, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    shutil.copytree(ran.results, results)
    before = {name: digest for name, digest in content(results).items() if "phase-" in name}
    phases = [
        {"tokens": 3000, "mixture": {"code": 100}, "sequence_length": LENGTH, "unique_tokens": few}
        for few in (5, 361)
    ]
    plan = read_plan(write_plan(folder, prepared.tokenizer_dir, phases=phases))
    with pytest.raises(WorkError, match="phase 2 needs 6 sequences of code"):
        run_plan(Graph.of(plan, results), workers=1, progress=False)
    after = {name: digest for name, digest in content(results).items() if "phase-" in name}
    assert before == after
    assert not list(results.glob(".phase-*"))


def test_what_changes_while_a_plan_runs_is_refused(
    folder: Path, prepared: PreparedData, tmp_path: Path
) -> None:
    """Results are named by the hashes of tokenizer and inputs that the run began with."""
    for name in ("tree", "code.parquet", "web.jsonl.gz"):
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
        copy(folder / name, tmp_path / name)
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(prepared.tokenizer_dir, tokenizer)
    graph = Graph.of(read_plan(write_plan(tmp_path, tokenizer)), tmp_path / "results")
    text = (tmp_path / "tree" / "m0.py").read_text()
    (tmp_path / "tree" / "m0.py").write_text(text + "# more\n")
    with pytest.raises(InputError, match=r"m0\.py: it has \d+ bytes now, and had"):
        run_plan(graph, stage="documents", workers=1, progress=False)
    (tmp_path / "tree" / "m0.py").write_text(text)
    for stage in ("documents", "exact"):
        run_plan(graph, stage=stage, workers=1, progress=False)
    values = json.loads((tokenizer / "tokenizer.json").read_text())
    (tokenizer / "tokenizer.json").write_text(json.dumps(values, indent=1))
    with pytest.raises(InputError, match="it has changed since this run of the plan began"):
        run_plan(graph, stage="tokens", workers=1, progress=False)
    assert not list((tmp_path / "results" / "tokens").glob("*"))


def test_rows_are_read_in_blocks(
    plan: Plan, ran: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of three rows, which many shards have more of, give the same bytes."""
    monkeypatch.setattr(row_file, "BLOCK_ROWS", 3)
    monkeypatch.setattr(encoding, "BLOCK_ROWS", 3)
    graph = Graph.of(plan, tmp_path / "results")
    run_plan(graph, workers=1, progress=False)
    made, whole = content(graph.results), content(ran.results)
    assert made
    # The other folder has results of other plans too.
    assert made == {name: whole[name] for name in made}


def test_too_little_text_is_refused_with_the_gap(
    folder: Path, prepared: PreparedData, ran: Graph
) -> None:
    phases = [{"tokens": 10**9, "mixture": {"code": 100}, "sequence_length": LENGTH}]
    plan = read_plan(write_plan(folder, prepared.tokenizer_dir, phases=phases))
    graph = Graph.of(plan, ran.results)
    run_plan(graph, stage="select", workers=1, progress=False)
    with pytest.raises(InputError, match=r"sources\.code: .* need 1,000,000,000, and 3 passes"):
        graph.packs()


def test_file_names_that_are_not_utf8_are_read(prepared: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for seed in range(3):
        name = os.fsdecode(b"m%d\xff.py" % seed)
        (tmp_path / "tree" / name).write_text(rich(seed))
    sources = {"code": {"kind": "code", "inputs": ["tree"]}}
    phases = [{"tokens": 100, "mixture": {"code": 100}, "sequence_length": LENGTH}]
    plan = read_plan(write_plan(tmp_path, prepared.tokenizer_dir, sources=sources, phases=phases))
    graph = Graph.of(plan, tmp_path / "results")
    for stage in ("documents", "exact", "tokens", "select"):
        run_plan(graph, stage=stage, workers=1, progress=False)
    assert sum(task.manifest(graph.results)["documents_read"] for task in graph.documents) == 3


def test_a_changed_plan_replaces_the_tokenizer_and_removes_other_phases(
    folder: Path, prepared: PreparedData, tmp_path: Path
) -> None:
    phases = [{"tokens": 2000, "mixture": {"web": 100}, "sequence_length": LENGTH}]
    sources = {"web": {"kind": "text", "inputs": ["web.jsonl.gz"]}}
    other = tmp_path / "other"
    shutil.copytree(prepared.tokenizer_dir, other)
    values = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(values, indent=1))
    stale = tmp_path / "results" / "phase-2"
    for tokenizer in (prepared.tokenizer_dir, other):
        # As an earlier version of the plan with two phases leaves it.
        stale.mkdir(parents=True)
        plan = read_plan(write_plan(folder, tokenizer, phases=phases, sources=sources))
        run_plan(Graph.of(plan, tmp_path / "results"), workers=1, progress=False)
        expected = tokenizer_hash(tokenizer)
        for made in ("tokenizer", "phase-1/web/tokenizer"):
            assert tokenizer_hash(tmp_path / "results" / made) == expected
        assert not stale.exists()
