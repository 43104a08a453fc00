"""Runs on disk: states, progress, and folders whose files are missing or damaged."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from mellum2_megatron.checkpoint.folder import TRACKER_FILE
from mellum2_megatron.checkpoint.run_list import RunOnDisk, read_curves, runs_in
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import to_yaml
from mellum2_megatron.recipes import recipe

RUN = dataclasses.replace(recipe("mellum2_tiny_pretrain"), timeout_minutes=10.0)
STEPS = RUN.schedule.train_steps


def folder_of(place: Path, *events: dict[str, object], saved: int = 0, idle: float = 0) -> Path:
    """Write a run folder: its last logged step is 7, its provenance has these events."""
    place.mkdir(parents=True)
    (place / "run.yaml").write_text(to_yaml(RUN))
    lines: list[dict[str, object]] = [
        {"kind": "train", "step": 7, "lm_loss": 3.5, "samples": 56.0},
        {"kind": "valid", "step": 7, "lm_loss": 3.75},
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "provenance.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    if saved:
        (place / TRACKER_FILE).write_text(str(saved))
    for file in place.iterdir():
        stat = file.stat()
        os.utime(file, (stat.st_atime, stat.st_mtime - idle))
    return place


START = {"event": "start"}


@pytest.mark.parametrize(
    ("events", "saved", "idle", "state"),
    [
        ((START, {"event": "end", "outcome": "finished"}), STEPS, 0, "finished"),
        ((START,), STEPS, 0, "finished"),
        ((START, {"event": "end", "outcome": "stopped"}), 7, 0, "stopped"),
        ((START, {"event": "end", "outcome": "failed"}), 0, 0, "failed"),
        ((START,), 0, 0, "running"),
        ((START, {"event": "end", "outcome": "stopped"}, START), 7, 0, "running"),
        ((START,), 0, 11 * 60, "failed"),
        ((), 0, 0, "new"),
        (({"event": "launch"},), 0, 0, "new"),
    ],
)
def test_the_state_follows_from_the_last_start_and_its_end(
    tmp_path: Path, events: tuple[dict[str, object], ...], saved: int, idle: float, state: str
) -> None:
    run = RunOnDisk.of(folder_of(tmp_path / "x", *events, saved=saved, idle=idle))
    assert run.state == state
    assert (run.recipe, run.step, run.steps) == (RUN.name, max(7, saved), STEPS)
    assert (run.samples, run.loss, run.valid_loss) == (56.0, 3.5, 3.75)


def test_a_search_finds_nested_runs_and_does_not_enter_them(tmp_path: Path) -> None:
    older = folder_of(tmp_path / "chain" / "a", START, idle=100)
    newer = folder_of(tmp_path / "b", START)
    folder_of(older / "inside", START)
    assert [run.folder for run in runs_in(tmp_path)] == [older, newer]


def test_damaged_files_are_named_and_hide_no_other_run(tmp_path: Path) -> None:
    whole = folder_of(tmp_path / "whole", START)
    metrics = folder_of(tmp_path / "metrics", START, idle=10)
    (metrics / "metrics.jsonl").write_text('{"kind": "train"\n')
    yaml = folder_of(tmp_path / "yaml", START, idle=20)
    (yaml / "run.yaml").write_text("name: [")
    found = {run.folder: run for run in runs_in(tmp_path)}
    assert "metrics.jsonl line 1" in found[metrics].problem
    assert found[yaml].state == "unreadable"
    assert "not YAML" in found[yaml].problem
    assert found[whole].problem == ""


def test_a_run_that_has_logged_nothing_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", START)
    assert read_curves(folder).recipe == RUN.name
    (folder / "metrics.jsonl").write_text('{"kind": "event", "step": 1, "note": "x"}\n')
    with pytest.raises(InputError, match="no step of a training is in it yet"):
        read_curves(folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"it has no metrics\.jsonl"):
        read_curves(folder)
    with pytest.raises(InputError, match="there is no such folder"):
        runs_in(folder / "absent")


def test_a_run_of_an_older_version_is_read_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "x", START)
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text.replace("  sample_tokens: 32\n", ""))
    assert (folder / "run.yaml").read_text() != text
    assert RunOnDisk.of(folder).recipe == read_curves(folder).recipe == RUN.name
    assert caplog.records == []
