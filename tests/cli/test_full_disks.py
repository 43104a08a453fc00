"""Full disks: one message, and earlier files stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conversion.convert import import_hf
from mellum2_megatron.checkpoint.folder import TRACKER_FILE
from tests.cli.runner import PREPARE, mellum2, process, snapshot
from tests.conversion.releases import write_model


def test_full_disk_ends_with_one_message(
    mounted: Callable[[str], Path],
    hf_folder: Path,
    checkpoint: Path,
    texts: Path,
    small_run: list[str],
    tmp_path: Path,
) -> None:
    disk = mounted("size=64k")
    write_model(tmp_path / "model")
    released = tmp_path / "megatron"
    import_hf(tmp_path / "model", released)
    np.save(tmp_path / "tokens.npy", np.ones((8, 40), dtype=np.int64))
    (disk / "kept").write_text("kept")
    before = snapshot(disk)
    tokens, out = ["--tokens", tmp_path / "tokens.npy"], ["--out", disk / "out.npz"]
    for code, words in (
        (2, ["train", *small_run, "--output", disk / "run"]),  # not even one checkpoint would fit
        (1, ["convert", "import", "--hf-path", hf_folder, "--megatron-path", disk / "checkpoint"]),
        (1, ["convert", "export", "--megatron-path", checkpoint, "--hf-path", disk / "hf"]),
        (1, ["release", "--megatron-path", released, "--output", disk / "out", "--member", "base"]),
        (1, ["data", "prepare", "--input", texts, "--output", disk / "x", *PREPARE]),
        (1, ["score", *tokens, *out, "--hf-path", hf_folder]),
    ):
        mellum2(*words).refused(str(disk), code=code)
        assert snapshot(disk) == before, words


@pytest.mark.distributed
def test_disk_full_in_training_leaves_complete_checkpoints(
    mounted: Callable[[str], Path], corpus: Path, small_run: list[str], tmp_path: Path
) -> None:
    """Real ranks: the checkpoint that did not fit is removed, and the earlier one is complete."""
    disk = mounted("size=5m")  # a checkpoint takes 3.5 MB
    file = tmp_path / "run.yaml"
    file.write_text(mellum2("train", *small_run, "--dry-run", "--output", disk / "run").out)
    result = process("train", file, "--device", "cpu", "--nproc", "2")
    assert result.code == 1, result
    assert "step 1/3" in result.out
    facts = ("training data:", "balancing of experts:")
    message = [line for line in result.err.splitlines() if not line.startswith(facts)]
    assert len(message) == 1, result.err
    assert f"the disk of {disk / 'run'} is full" in message[0]
    assert "Fix: free space" in message[0]
    run = disk / "run"
    assert (run / TRACKER_FILE).read_text() == "1"
    assert [path.name for path in run.glob("iter_*")] == ["iter_0000001"]
    assert not list(run.rglob("*.partial"))
    exported = mellum2("convert", "export", "--megatron-path", run, "--hf-path", tmp_path / "hf")
    assert exported.code == 0, exported
    mellum2("train", file, "--device", "cpu").refused("MB free", "free space")
    assert (run / TRACKER_FILE).read_text() == "1"
