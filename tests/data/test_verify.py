"""`data verify` names every damaged file, of a plan and of Megatron's format."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.phase_record import PHASE_FILE, PLAN_FILE
from mellum2_megatron.data.pipeline.plan_file import read_plan
from mellum2_megatron.data.pipeline.run import open_plan, run_plan
from mellum2_megatron.data.pipeline.tasks import MANIFEST
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.pack_files import PACKS_FILE
from mellum2_megatron.data.verify import verify_data
from tests.cli.runner import mellum2
from tests.data.plan_inputs import LENGTH, rich, write_plan


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory, prepared: PreparedData) -> Path:
    """Plan that has run, with its results in ``corpus``."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "tree").mkdir()
    for seed in range(12):
        (folder / "tree" / f"m{seed}.py").write_text(rich(seed))
    phase = {"tokens": 1500, "mixture": {"code": 100}, "sequence_length": LENGTH}
    file = write_plan(
        folder,
        prepared.tokenizer_dir,
        output="corpus",
        sources={"code": {"kind": "code", "inputs": ["tree"]}},
        phases=[phase, phase | {"mixture": {"code": 100.0}}],
    )
    graph = open_plan(read_plan(file), file.read_text(), progress=False)
    run_plan(graph, workers=1, progress=False)
    return file


@pytest.fixture
def corpus(plan_file: Path, tmp_path: Path) -> Path:
    """Copy of the results, links between them included."""
    subprocess.run(["cp", "-a", plan_file.parent / "corpus", tmp_path / "corpus"], check=True)
    return tmp_path / "corpus"


def one(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def flip(path: Path) -> None:
    """Change one bit and keep the length."""
    values = bytearray(path.read_bytes())
    values[-1] ^= 1
    path.write_bytes(values)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def spoil(path: Path) -> None:
    path.write_text("{")


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("documents/*/documents*", flip, "other bytes"),
    ("exact/*/" + MANIFEST, Path.unlink, "cannot be read"),
    ("tokens/*/ids.bin", cut, "it should have"),
    ("select/*/" + MANIFEST, spoil, "cannot be read"),
    ("packs/*/*.bin", flip, "other bytes"),
    ("packs/*/*.idx", Path.unlink, "it is missing"),
    ("tokenizer/tokenizer.json", flip, "not the tokenizer"),
    ("phase-1/code/tokenizer/tokenizer.json", Path.unlink, "it is missing"),
    ("phase-2/code/" + PACKS_FILE, spoil, "it is damaged"),
    ("phase-2/" + PHASE_FILE, Path.unlink, "it is missing"),
]


def test_whole_data_are_counted(plan_file: Path, corpus: Path, prepared: PreparedData) -> None:
    """By folder, by plan, by the plan's copy among its results, and for one phase or its packs."""
    folder, files, size = verify_data(corpus, progress=False)
    assert folder == corpus
    assert files > len(list(corpus.glob("phase-*/*/*.bin")))
    assert verify_data(corpus / PLAN_FILE, progress=False) == (corpus, files, size)
    original = plan_file.parent / "corpus"
    assert verify_data(plan_file, progress=False) == (original, files, size)
    shown = mellum2("data", "verify", plan_file)
    assert shown.code == 0
    assert f"{original}: {files:,} files" in shown.out
    for part in (corpus / "phase-1", corpus / "phase-1" / "code", prepared.path):
        assert 0 < verify_data(part, progress=False)[1] < files


def test_every_damaged_file_of_a_plan_is_named_at_once(corpus: Path) -> None:
    damaged = {one(corpus, pattern): words for pattern, _, words in DAMAGE}
    for pattern, harm, _ in DAMAGE:
        harm(one(corpus, pattern))
    result = mellum2("data", "verify", corpus)
    result.refused(str(corpus), f"{len(damaged)} damaged file(s)", "run the plan again")
    lines = {
        path: line
        for line in result.err.splitlines()
        for path in damaged
        if line.strip().startswith(f"{path}: ")
    }
    assert lines.keys() == damaged.keys(), result.err
    for path, words in damaged.items():
        assert words in lines[path]


@pytest.mark.parametrize(("pattern", "harm", "words"), DAMAGE, ids=[row[0] for row in DAMAGE])
def test_each_kind_of_damage_is_found_alone(
    pattern: str, harm: Callable[[Path], object], words: str, corpus: Path
) -> None:
    """A file that a phase shares with stage `packs` is named as the result to remove."""
    path = one(corpus, pattern)
    harm(path)
    with pytest.raises(InputError, match=words) as refusal:
        verify_data(corpus, progress=False)
    assert f"1 damaged file(s)\n  {path}: " in str(refusal.value)


def test_damage_in_copies_of_a_phase_is_named_there(corpus: Path, tmp_path: Path) -> None:
    """Copied without links, a phase has bytes of its own."""
    phase = Path(shutil.copytree(corpus / "phase-1", tmp_path / "elsewhere"))
    damaged = [one(phase, "code/train-*.bin"), one(phase, "code/valid-*.bin")]
    for path in damaged:
        flip(path)
    with pytest.raises(InputError) as refusal:
        verify_data(phase, progress=False)
    assert [str(path) in str(refusal.value) for path in damaged] == [True, True]


def test_every_damaged_file_of_megatrons_format_is_named(
    prepared: PreparedData, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(prepared.path, tmp_path / "corpus"))
    flip(folder / "train_document.bin")
    cut(folder / "train_document.idx")
    (folder / "valid_document.bin").unlink()
    flip(folder / "tokenizer" / "tokenizer.json")
    result = mellum2("data", "verify", folder)
    result.refused("4 damaged file(s)")
    for name in ("train_document.bin", "train_document.idx", "valid_document.bin", "tokenizer.js"):
        assert f"\n  {folder}/" in result.err
        assert name in result.err


def test_a_file_that_cannot_be_read_is_named_with_the_others(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a failing disk."""
    broken, changed = one(corpus, "tokens/*/ids.bin"), one(corpus, "packs/*/*.bin")
    flip(changed)
    whole = Path.open

    def fail(path: Path, *mode: Any, **options: Any) -> Any:
        if path == broken:
            raise OSError(5, "Input/output error")
        return whole(path, *mode, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(InputError) as refusal:
        verify_data(corpus, progress=False)
    assert f"{broken}: Input/output error" in str(refusal.value)
    assert f"{changed}: " in str(refusal.value)


def test_a_plan_that_has_not_run_names_the_command(plan_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(plan_file.read_text().replace("output: corpus", "output: later"))
    result = mellum2("data", "verify", file)
    result.refused(str(file), "has not run", str(tmp_path / "later"), f"mellum2 data run {file}")
    mellum2("data", "verify", tmp_path / "none").refused(str(tmp_path / "none"))
