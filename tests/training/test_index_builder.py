"""`mellum2 data index`: what it leaves for a start, after damage and kills, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from mellum2_megatron.checkpoint import write_run_folder
from mellum2_megatron.config import Run, to_yaml
from mellum2_megatron.data.feed import index_plan
from mellum2_megatron.data.feed.index_plan import HASHES, run_indices
from mellum2_megatron.data.feed.sources import check_data
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.training import index_builder
from tests.cli.runner import Result, mellum2, snapshot
from tests.data.packs import write_folder
from tests.training.test_train import small_run, train

pytestmark = pytest.mark.distributed

Inodes = dict[str, tuple[int, int, int]]


def files(folder: Path) -> Inodes:
    """Return number, length and time of each file."""
    found = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (each.st_ino, each.st_size, each.st_mtime_ns) for name, each in found.items()}


def index_files(run: Run, folder: Path, *options: str) -> Result:
    file = folder / "asked.yaml"
    file.write_text(to_yaml(run))
    return mellum2("data", "index", file, *options)


@pytest.fixture
def run(small_data: PreparedData, tmp_path: Path) -> Run:
    """Return a run on a blend of a folder and a prefix, each with a validation set."""
    words = (
        f"data.train=[[3,{small_data.path}],[1,{small_data.path / 'train_document'}]]",
        f"data.cache={tmp_path / 'cache'}",
    )
    return small_run(small_data, tmp_path / "run", *words)


@pytest.mark.slow
def test_a_start_finds_all_and_writes_none(run: Run, tmp_path: Path) -> None:
    shown = index_files(run, tmp_path, "--workers", "1")
    assert shown.code == 0, shown
    assert "3 of 3 indices to build" in shown.out
    assert shown.out.count("; built; ") == 3
    assert "all 3 indices are complete" in shown.out
    before = files(tmp_path / "cache")
    train(run, 2)
    assert files(tmp_path / "cache") == before


@pytest.mark.slow
def test_a_rerun_mends_damage_and_builds_what_is_missing(run: Run, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert index_files(run, tmp_path, "--workers", "2").code == 0
    before = snapshot(cache)
    first, second, third = run_indices(run, check_data(run))
    # One byte; one file that a kill kept from its name, beside what it left; one without hashes.
    damaged = first.file("shuffle_index.npy")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    second.file("description.txt").unlink()
    leftover = cache / f".{second.name}.new-abcdefgh.partial"
    leftover.mkdir()
    (leftover / "lock").touch()
    (leftover / f"{second.name}-document_index.npy").write_bytes(b"half")
    third.file(HASHES).unlink()
    shown = index_files(run, tmp_path, "--workers", "1")
    assert "1 of 3 indices to build" in shown.out
    for state in ("damaged, built anew", "built", "found, hashes written down"):
        assert shown.out.count(f"; {state}; ") == 1, shown
    assert snapshot(cache) == before
    assert shown.code == 0
    assert json.loads(first.file(HASHES).read_text())["shuffle_index.npy"] == before[damaged.name]


def test_dry_run_lists_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    shown = index_files(run, tmp_path, "--dry-run")
    assert shown.code == 0, shown
    assert shown.out.count("; missing; ") == 3
    assert not (tmp_path / "cache").exists()


def test_what_cannot_work_is_refused_before_anything_is_written(
    run: Run, small_data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str, named: str) -> None:
        mellum2("data", "index", *words).refused(named)

    words = ["mellum2_tiny_pretrain", "data.sequence_length=64"]
    refused(*words, f"data.train=[[1,{tmp_path / 'none'}]]", named="none.bin does not exist")
    packs = write_folder(tmp_path / "packs", small_data.path / "tokenizer")
    refused(*words, f"data.path={packs}", "logging.eval_iterations=0", named="packs need no index")
    corpus = f"data.path={small_data.path}"
    small = [*words, corpus, "architecture.vocab_size=384", "logging.eval_iterations=0"]
    (tmp_path / "file").touch()
    refused(*small, f"data.cache={tmp_path / 'file'}", named="is a file")
    cache = f"data.cache={tmp_path / 'cache'}"
    refused(*small, cache, "--memory", "0.1", named="raise --memory")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    refused(*small, cache, named="are free on its disk")
    assert not (tmp_path / "cache").exists()
    refused("mellum2_tiny_rlvr", named="")


def test_processes_together_stay_within_the_memory(run: Run) -> None:
    large, _, small = sorted(
        run_indices(run, check_data(run)), key=lambda index: index.memory, reverse=True
    )
    fits = index_builder._first_fitting
    both = large.memory + small.memory
    assert fits([large, small], [], 1) is large
    assert fits([small], [large], both) is small
    assert fits([small], [large], both - 1) is None
    assert fits([large, small], [small], 2 * small.memory) is small


def test_the_start_names_the_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_plan, "LARGE", 1)
    write_run_folder(run)
    file = tmp_path / "run" / "run.yaml"
    shown = mellum2("train", file, "--device", "cpu", "--dry-run")
    assert f"Build them before: mellum2 data index {file}\n" in shown.out, shown
    assert "mellum2 data index" in mellum2("doctor", file, "--device", "cpu").out
