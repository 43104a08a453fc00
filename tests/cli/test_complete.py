"""Completions of the shell, and help texts in a narrow terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mellum2_megatron.cli.complete import (
    complete_keys,
    complete_override,
    complete_recipe,
    complete_subject,
)
from tests import REPOSITORY
from tests.cli.runner import TINY, mellum2


def test_recipes_run_files_and_folders_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    for name in ("run.yaml", "notes.md", "mine.py", ".hidden.yaml"):
        (tmp_path / "runs" / name).touch()
    assert TINY in list(complete_recipe("mellum2_tiny"))
    assert list(complete_recipe("ru")) == ["runs/"]
    assert list(complete_recipe("runs/")) == ["runs/a/", "runs/mine.py", "runs/run.yaml"]
    assert "mellum2-12b" in " ".join(complete_subject("mellum2-"))
    assert list(complete_override(f"data.path={tmp_path}/runs/n")) == [
        f"data.path={tmp_path}/runs/notes.md"
    ]


def test_keys_and_their_choices_complete() -> None:
    assert list(complete_keys("layo")) == ["layout", *complete_keys("layout.")]
    assert list(complete_override("layout.et")) == ["layout.etp="]
    assert list(complete_override("optimizer.name=")) == [
        "optimizer.name=muon",
        "optimizer.name=adam",
    ]
    assert list(complete_override("layout.sp=t")) == ["layout.sp=true"]
    assert list(complete_override("layout.dp=")) == ["layout.dp=null"]
    assert list(complete_override("layot.dp=")) == []


def test_the_shell_gets_completions_without_torch() -> None:
    """As bash asks for them: words in the environment, one completion a line."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONPROFILEIMPORTTIME": "1",
        "_MELLUM2_COMPLETE": "complete_bash",
        "COMP_WORDS": f"mellum2 train {TINY} layout.c",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(
        [str(Path(sys.executable).with_name("mellum2"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["layout.cp="]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "mellum2_megatron.cli.complete" in imported
    assert not imported & {"torch", "transformers", "megatron"}


def test_h_is_help_and_brackets_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words in ([], ["train"], ["launch"], ["launch", "run"], ["data", "prepare"], ["convert"]):
        short, long = mellum2(*words, "-h"), mellum2(*words, "--help")
        assert short == long
        assert short.code == 0
        assert max(map(len, short.out.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "200")
    assert "[b, s, vocabulary]" in mellum2("score", "-h").out


def test_keys_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = mellum2("keys", "layout.ep").out.splitlines()
    assert shown[:2] == ["layout.ep=1", "    (a whole number)"]
    assert shown[2].startswith("    expert-parallel ways, default 1")
    assert max(len(line) for line in mellum2("keys", "loss").out.splitlines()) <= 80
    mellum2("keys", "layot").refused("layot", "no such key or section")
