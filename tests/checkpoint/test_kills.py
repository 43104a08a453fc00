"""A run's folder, its logs and its pruned checkpoints, killed at every change of the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from mellum2_megatron.checkpoint import find_checkpoint, read_run, write_run_folder
from mellum2_megatron.checkpoint.folder import (
    RUN_FILE,
    TRACKER_FILE,
    iteration_folder_name,
    iteration_folders,
    write_architecture,
    write_tracker,
)
from mellum2_megatron.checkpoint.saving import remove_old, remove_partial_checkpoints
from mellum2_megatron.common.provenance import read_records, record
from mellum2_megatron.config import apply_overrides
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.metrics.log import METRICS_FILE, MetricsLogger, read_metrics
from mellum2_megatron.recipes import recipe
from tests.kills import contents, survives_kills


def test_pruning_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """Every folder that counts as a checkpoint is whole, the tracked one is there."""
    files = ("common.pt", "__0_0.distcp", "metadata.json", "integrity.json")

    def start(folder: Path) -> None:
        for step in (1, 2, 3):
            checkpoint = folder / iteration_folder_name(step)
            checkpoint.mkdir()
            for name in files:
                (checkpoint / name).write_text(str(step))
        write_architecture(folder, recipe("mellum2_tiny_pretrain").architecture)
        write_tracker(folder, 3)

    def check(folder: Path) -> None:
        assert find_checkpoint(folder).iteration == 3
        for checkpoint in iteration_folders(folder):
            assert {path.name for path in checkpoint.iterdir()} == set(files)

    def again(folder: Path) -> None:
        remove_partial_checkpoints(folder)
        remove_old(folder, keep_last=1, retain_interval=None)

    survives_kills(
        lambda folder: remove_old(folder, keep_last=1, retain_interval=None),
        tmp_path,
        start=start,
        check=check,
        again=again,
    )


def test_a_new_start_leaves_the_former_run_folder_or_the_new_one(
    small_data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run file, tokenizer and logs can be read after a kill at any moment of a start."""
    # Git is a process of its own.
    monkeypatch.setattr("mellum2_megatron.common.provenance._from_git", lambda *_: None)

    def write(folder: Path, seed: int) -> None:
        words = [f"data.path={small_data.path}", f"checkpoint.output={folder}", f"seed={seed}"]
        write_run_folder(apply_overrides(recipe("mellum2_tiny_pretrain"), words))
        record(folder, event="start", more={"seed": seed})
        logger = MetricsLogger(
            folder,
            rank=0,
            world_size=1,
            run_name="x",
            total_steps=2,
            total_samples=2,
            resume_step=1,
            tensorboard=False,
        )
        logger.log_step(1 if seed == 1 else 2, {"lm_loss": 1.0})
        logger.close()

    def check(folder: Path) -> None:
        assert read_run(folder / RUN_FILE).seed in (1, 2)
        expected = contents(small_data.tokenizer_dir)
        assert contents(folder / "tokenizer") == expected
        assert read_records(folder)[0]["seed"] == 1
        assert [line.step for line in read_metrics(folder / METRICS_FILE)] in ([1], [1, 2])

    survives_kills(
        lambda folder: write(folder, 2),
        tmp_path,
        start=lambda folder: write(folder, 1),
        check=check,
        kills=12,
        # They hold times, and the folder's own path.
        compare=lambda folder: dict.fromkeys(contents(folder)),
    )


def test_lines_cut_off_by_a_kill_are_left_out(tmp_path: Path) -> None:
    """Of every reader: the lines before are whole, and the next line is not swallowed."""
    options = {
        "rank": 0,
        "world_size": 1,
        "run_name": "x",
        "total_steps": 9,
        "total_samples": 9,
        "tensorboard": False,
    }
    logger = MetricsLogger(tmp_path, resume_step=0, **options)  # type: ignore[arg-type]
    for step in (1, 2):
        logger.log_step(step, {"lm_loss": step})
        record(tmp_path, event="start", from_step=step)
    logger.close()
    for name in (METRICS_FILE, "provenance.jsonl"):
        text = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(text[: -len(text.splitlines()[-1]) // 2])
    assert [line.step for line in read_metrics(tmp_path / METRICS_FILE)] == [1]
    assert [line["from_step"] for line in read_records(tmp_path)] == [1]
    logger = MetricsLogger(tmp_path, resume_step=2, **options)  # type: ignore[arg-type]
    logger.log_step(3, {"lm_loss": 3})
    logger.close()
    record(tmp_path, event="start", from_step=3)
    assert [line.step for line in read_metrics(tmp_path / METRICS_FILE)] == [1, 3]
    assert [line["from_step"] for line in read_records(tmp_path)] == [1, 3]
    assert not (tmp_path / TRACKER_FILE).exists()
