"""An interrupted conversion leaves nothing that looks complete; the same call completes it."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.convert import export_hf, import_hf, plan_export, plan_import
from conversion.huggingface.folder import HfFolder
from conversion.jobs.result_folder import JOURNAL_FILE, partial_folder
from conversion.jobs.weights_manifest import WeightRecord
from conversion.jobs.workers import Stop, run_units, worker_count
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.checkpoint.file_manifest import MANIFEST_FILE
from mellum2_megatron.common.errors import InputError, WorkError
from tests.conversion.folders import load_tensors, write_folder

Convert = Callable[..., Any]
BOTH = pytest.mark.parametrize("kind", ["import", "export"])


def both(kind: str, hf_folder: Path, checkpoint: Path) -> tuple[Convert, Path]:
    return (import_hf, hf_folder) if kind == "import" else (export_hf, checkpoint)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file but `.metadata` (has a random identifier) and the manifest."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    moments = (".metadata", MANIFEST_FILE)
    return {
        name: b"" if name.endswith(moments) else path.read_bytes() for name, path in files.items()
    }


def hashing(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> list[str]:
    """Call ``act`` when tensor ``at`` is hashed; return the list that collects hashed names."""
    original, names = WeightRecord.of, []

    def counted(name: str, tensor: torch.Tensor) -> WeightRecord:
        names.append(name)
        if len(names) == at:
            act()
        return original(name, tensor)

    monkeypatch.setattr(WeightRecord, "of", counted)
    return names


@BOTH
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_the_same_call_continues(
    error: BaseException,
    kind: str,
    hf_folder: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    convert, source = both(kind, hf_folder, checkpoint)
    convert(source, tmp_path / "whole")
    old = write_folder(tmp_path / "out", seed=1)  # what --overwrite would replace
    before = contents(old)

    def fail() -> None:
        raise error

    with monkeypatch.context() as patch:
        names = hashing(patch, 40, fail)
        with pytest.raises(WorkError if isinstance(error, OSError) else KeyboardInterrupt):
            convert(source, old, overwrite=True, workers=1)
    assert contents(old) == before
    partial = partial_folder(old)
    for folder in (partial, partial / "result"):  # neither is taken for a result
        with pytest.raises(InputError):
            find_checkpoint(folder)
        with pytest.raises(InputError):
            HfFolder.open(folder)
    plan = plan_import if kind == "import" else plan_export
    done, units = plan(source, old, overwrite=True).continued
    assert 0 < done < units

    with monkeypatch.context() as patch:
        again = hashing(patch, -1, fail)
        convert(source, old, overwrite=True, workers=1)
    assert set(again) & set(names)  # the interrupted layer is done again
    assert set(names) - set(again)  # finished ones are not
    assert contents(old) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@BOTH
def test_a_killed_process_is_continued(
    kind: str, hf_folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partial folder of one moment, its journal cut off in a line, as after a power failure."""
    convert, source = both(kind, hf_folder, checkpoint)
    out, partial, saved = tmp_path / "out", partial_folder(tmp_path / "out"), tmp_path / "saved"
    with monkeypatch.context() as patch:
        hashing(patch, 40, lambda: shutil.copytree(partial, saved) and None)
        convert(source, out, workers=1)
    uninterrupted = contents(out)
    shutil.rmtree(out)
    with (saved / JOURNAL_FILE).open("a") as journal:
        journal.write('{"unit": "2", "files": {}, "payl')
    shutil.copytree(saved, partial)
    convert(source, out)
    assert contents(out) == uninterrupted

    # A finished file is lost: its units are converted again.
    shutil.rmtree(out)
    for file in [*(saved / "result").rglob("*.distcp"), *(saved / "result").rglob("*.safetensors")]:
        file.unlink()
    saved.rename(partial)
    convert(source, out)
    assert contents(out) == uninterrupted


@BOTH
def test_a_partial_result_of_something_else_is_not_continued(
    kind: str, hf_folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, source = both(kind, hf_folder, checkpoint)
    other = write_folder(tmp_path / "other", seed=5)
    import_hf(other, tmp_path / "other megatron")
    convert_other = other if kind == "import" else tmp_path / "other megatron"

    def fail() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        hashing(patch, 40, fail)
        with pytest.raises(KeyboardInterrupt):
            convert(convert_other, tmp_path / "out", workers=1)
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_second_process_is_refused(hf_folder: Path, tmp_path: Path) -> None:
    partial = partial_folder(tmp_path / "out")
    partial.mkdir()
    with (partial / JOURNAL_FILE).open("a+") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing it"):
            import_hf(hf_folder, tmp_path / "out")
    import_hf(hf_folder, tmp_path / "out")


def test_a_folder_that_only_has_the_name_is_left_alone(hf_folder: Path, tmp_path: Path) -> None:
    partial = partial_folder(tmp_path / "out")
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no conversion made it"):
        import_hf(hf_folder, tmp_path / "out")
    assert (partial / "thesis.txt").exists()


# -- workers -------------------------------------------------------------------------------------


@BOTH
def test_any_number_of_workers_writes_the_same(
    kind: str, hf_folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    convert, source = both(kind, hf_folder, checkpoint)
    for workers in (1, 2, 7):
        convert(source, tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "7")
    if kind == "export":
        expected, written = load_tensors(hf_folder), load_tensors(tmp_path / "7")
        assert written.keys() == expected.keys()
        assert all(torch.equal(expected[name], tensor) for name, tensor in written.items())


def test_the_first_error_stops_the_other_workers() -> None:
    stop, seen = Stop(), []

    def work(unit: int) -> None:
        seen.append(unit)
        if unit == 1:
            raise ValueError("broken")
        while True:  # until told to stop: the test would hang otherwise
            stop.check()

    with pytest.raises(ValueError, match="broken"):
        run_units(range(50), work, workers=3, stop=stop)
    assert len(seen) < 50


def test_worker_count() -> None:
    assert worker_count(3) == 3
    assert worker_count(None) >= 1
    with pytest.raises(InputError, match="--workers 0"):
        worker_count(0)
