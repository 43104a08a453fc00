"""The log: entries come from runs, and are only appended."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ablations.answering.log import HEAD, append_entry, log_entry
from ablations.asking.study import DataSet
from mellum2_megatron.cli.app import app
from mellum2_megatron.common.errors import InputError
from tests.ablations.study_files import NAME, STUDY, compared, write_study, write_task

DAY = datetime(2026, 11, 27, tzinfo=UTC)


def test_entries_are_appended(tmp_path: Path) -> None:
    write_study(tmp_path / "results")
    file = tmp_path / "LOG.md"
    first = compared(tmp_path / "results")
    entry = append_entry(first, file, now=DAY)
    text = file.read_text(encoding="utf-8")
    assert text == f"{HEAD}\n{entry}"
    assert text.startswith("# Log of ablations\n")
    assert "## 2026-11-27 second_head, tiny" in entry
    assert "Does a second head help? Published: HumanEval 20.73 -> 31.10 (report §6)." in entry
    assert "flat: `loss.z_loss_coef=0.01`" in entry
    assert "- with: **better** than without; published: better" in entry
    # A negative result is an entry like any other.
    assert "- flat: **no difference larger than 0.05**" in entry
    assert "9 runs, seeds 1, 2, 3, commit 0123456789, runs " in entry
    assert "Tiny scale" in entry
    with pytest.raises(InputError, match="entry of these 9 runs already"):
        append_entry(first, file, now=DAY)
    write_task(tmp_path / "results", "with", 4)
    second = compared(tmp_path / "results")
    append_entry(second, file, now=DAY)
    grown = file.read_text(encoding="utf-8")
    assert grown.startswith(text.rstrip())
    assert grown.count("## 2026-11-27") == 2


def test_an_arm_with_data_of_its_own_names_them(tmp_path: Path) -> None:
    write_study(tmp_path / "results")
    arms = (replace(STUDY.arms[0], data=DataSet(name="other", path="data/other")), *STUDY.arms[1:])
    study = replace(STUDY, arms=arms)
    entry = log_entry(compared(tmp_path / "results", study), DAY)
    (change,) = [line for line in entry.splitlines() if line.startswith("**Change.**")]
    assert f"{arms[0].name}: data `other`" in change


def test_no_entry_without_an_answer(tmp_path: Path) -> None:
    write_study(tmp_path / "results", seeds=2)
    comparison = compared(tmp_path / "results")
    with pytest.raises(InputError, match="no arm has the 3 seeds of the first look"):
        append_entry(comparison, tmp_path / "LOG.md")
    assert not (tmp_path / "LOG.md").exists()


def test_commands(tmp_path: Path) -> None:
    write_study(tmp_path / "results")
    file = tmp_path / f"{NAME}.py"
    file.write_text("from tests.ablations.study_files import STUDY\n", encoding="utf-8")
    words = [str(file), "--results", str(tmp_path / "results")]
    run = CliRunner().invoke
    log = tmp_path / "LOG.md"
    assert run(app, ["ablate", "report", *words]).exit_code == 0
    assert (tmp_path / "results" / NAME / "tiny" / "report" / "report.md").is_file()
    assert run(app, ["ablate", "log", *words, "--file", str(log)]).exit_code == 0
    assert log.read_text(encoding="utf-8").startswith(HEAD)
    with pytest.raises(InputError, match="already"):
        run(app, ["ablate", "log", *words, "--file", str(log)], catch_exceptions=False)
    with pytest.raises(InputError, match="no task of the study has finished"):
        run(app, ["ablate", "report", str(file), "--results", "none"], catch_exceptions=False)
