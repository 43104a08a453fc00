"""Runs on disk at the command line: list, pictures, and the last lines of a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launchers.start import report_end
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.config import apply_overrides, to_yaml
from tests.checkpoint.test_run_list import RUN, START, STEPS, folder_of
from tests.cli.runner import mellum2, snapshot

PNG = b"\x89PNG\r\n"
END = {"event": "end", "outcome": "finished"}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder_of(Path("runs/one"), START, END, saved=STEPS, idle=60)
    folder_of(Path("runs/two"), START)
    return Path("runs")


def test_the_list_fits_80_columns_and_json_has_every_number(runs: Path) -> None:
    lines = mellum2("runs").out.splitlines()
    assert lines[0] == f"runs/one  {RUN.name}"
    assert lines[1].split("  ")[1:5] == [
        "finished",
        f"step {STEPS}/{STEPS}",
        "56 samples",
        "loss 3.500",
    ]
    assert [line.split()[0] for line in lines[1::2]] == ["finished", "running"]
    assert max(map(len, lines)) <= 80
    (one, two) = json.loads(mellum2("runs", runs, "--json").out)
    assert (one["folder"], one["state"], two["step"], two["valid_loss"]) == (
        "runs/one",
        "finished",
        7,
        3.75,
    )
    mellum2("runs", "absent").refused("absent", "no such folder")


def test_pictures_go_where_they_are_asked_for(runs: Path) -> None:
    assert mellum2("plot", "runs/one", "runs/two").out.splitlines() == [
        "wrote runs/one/loss.png",
        "wrote runs/two/loss.png",
    ]
    mellum2("plot", "runs/one", "runs/two", "--compare", "--metric", "samples")
    mellum2("plot", "runs/one", "--metric", "samples", "--out", "new/x.png")
    for file in ("runs/one/loss.png", "runs/two/loss.png", "compare.png", "new/x.png"):
        assert Path(file).read_bytes().startswith(PNG), file


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["runs/one", "runs/absent"], "no such metrics file"),
        (["runs"], "it has no metrics.jsonl"),
        (["runs/one", "--metric", "sample"], "did you mean 'samples'"),
        (["runs/one", "--against", "hours"], "--against hours"),
        (["runs/one", "--against", "tokens"], "has not logged it"),
        (["runs/one", "runs/two", "--out", "x.png"], "--compare"),
        (["runs/one", "runs/one", "--compare"], "named twice"),
        (["runs/one", "--out", "x.pdf"], "PNG"),
    ],
)
def test_a_refused_plot_writes_nothing(runs: Path, words: list[str], named: str) -> None:
    before = snapshot(Path())
    mellum2("plot", *words).refused(named)
    assert snapshot(Path()) == before


def test_the_end_of_a_training_names_folder_losses_and_next_commands(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_end(runs / "one")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"runs/one: {STEPS} steps, training loss 3.500, validation loss 3.750",
        "loss curve: runs/one/loss.png",
    ]
    assert [line.split()[:2] for line in lines[2:]] == [["mellum2", "convert"], ["mellum2", "plot"]]
    assert (runs / "one/loss.png").read_bytes().startswith(PNG)
    # The training is saved, so a log that cannot be drawn is a line and no failure.
    (runs / "one/metrics.jsonl").write_text("x\n")
    report_end(runs / "one")
    assert "no loss curve: runs/one/metrics.jsonl line 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("architecture.shared_expert_intermediate_size=128", "has no shared expert"),
        ("loss.bias_update_rate=0.001", "by their scores alone"),
    ],
)
def test_the_end_of_a_training_names_no_export_that_would_be_refused(
    runs: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    file = runs / "one/run.yaml"
    file.write_text(to_yaml(apply_overrides(read_run(file), [override])))
    report_end(runs / "one")
    output = capsys.readouterr().out
    assert f"no export to Hugging Face: {override}" in output
    assert words in output
    assert "convert export" not in output
