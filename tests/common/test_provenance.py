"""Provenance records of Git repositories, packaged copies, packages and run folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mellum2_megatron.common import provenance
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.provenance import (
    RECORDS_FILE,
    SNAPSHOT_FILE,
    Code,
    read_records,
    record,
    recorded_code,
    source_code,
    write_snapshot,
)
from tests import REPOSITORY


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the one file of this project that matters here."""
    root = tmp_path / "checkout"
    (root / "mellum2_megatron").mkdir(parents=True)
    (root / "mellum2_megatron" / "__init__.py").write_text("")
    (root / ".gitignore").write_text("runs/\n.venv/\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "first")
    return root


def test_checkout_has_commit_and_changes(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    code = source_code(checkout)
    assert (code.origin, code.commit, code.dirty) == ("git", head, False)
    assert str(code) == f"commit {head}"
    (checkout / "runs").mkdir()
    (checkout / "runs" / "log").write_text("ignored files are no change")
    assert source_code(checkout).dirty is False
    (checkout / "new.py").write_text("")
    assert source_code(checkout).dirty is True
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message", "second")
    assert source_code(checkout).commit == git(checkout, "rev-parse", "HEAD") != head
    (checkout / "mellum2_megatron" / "__init__.py").write_text("# changed")
    assert str(source_code(checkout)).endswith(" with uncommitted changes")


def test_an_environment_inside_a_checkout_is_no_checkout(checkout: Path) -> None:
    """Its files are not the repository's, whatever commit that is at."""
    site = checkout / ".venv" / "site-packages"
    shutil.copytree(checkout / "mellum2_megatron", site / "mellum2_megatron")
    code = source_code(site)
    assert (code.origin, code.commit, code.dirty) == ("package", None, None)
    assert str(code) == "commit not known (installed as a package, not run from a Git checkout)"


def test_copy_without_git_names_its_origin(checkout: Path, tmp_path: Path) -> None:
    original = source_code(checkout)
    copy = tmp_path / "copy"
    shutil.copytree(checkout / "mellum2_megatron", copy / "mellum2_megatron")
    assert source_code(copy).origin == "package"
    assert write_snapshot(copy, original) == copy / SNAPSHOT_FILE
    assert source_code(copy) == Code(
        origin="snapshot", version=original.version, commit=original.commit, dirty=original.dirty
    )
    inside = shutil.copytree(copy, checkout / "runs" / "copy")
    assert source_code(inside).origin == "snapshot"
    shutil.copy(copy / SNAPSHOT_FILE, checkout)  # left over in a checkout: Git knows better
    assert source_code(checkout).origin == "git"
    (copy / SNAPSHOT_FILE).write_text('{"origin": "git", "version": "1", "commit": "none"}')
    with pytest.raises(InputError, match="package the code again"):
        source_code(copy)


def test_a_checkout_that_git_does_not_read_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    code = source_code(checkout)
    assert (code.origin, code.commit, code.reason) == (
        "unknown",
        None,
        "git is not installed here",
    )


def test_a_repository_without_commits_has_none(tmp_path: Path) -> None:
    (tmp_path / "mellum2_megatron").mkdir()
    (tmp_path / "mellum2_megatron" / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    assert source_code(tmp_path).origin == "unknown"


def test_git_variables_of_the_caller_do_not_matter(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook runs with GIT_DIR of another repository."""
    monkeypatch.setenv("GIT_DIR", str(REPOSITORY / ".git"))
    code = source_code(checkout)
    monkeypatch.delenv("GIT_DIR")
    assert code.commit == git(checkout, "rev-parse", "HEAD")


def test_each_start_adds_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "GROUP_WORLD_SIZE": "2",
        "SLURM_JOB_ID": "47",
        "SLURM_RESTART_COUNT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    first = record(tmp_path, event="launch")
    with (tmp_path / RECORDS_FILE).open("a") as file:
        file.write('{"event": "sta')  # the machine went down
    second = record(tmp_path, event="start", world_size=4, from_step=100, more={"device": "cpu"})
    assert read_records(tmp_path) == [first, second]
    lines = (tmp_path / RECORDS_FILE).read_text().splitlines()
    assert [json.loads(lines[index]) for index in (0, 2)] == [first, second]
    assert (second["world_size"], second["hosts"], second["from_step"], second["device"]) == (
        4,
        2,
        100,
        "cpu",
    )
    assert second["slurm"] == {"SLURM_JOB_ID": "47", "SLURM_RESTART_COUNT": "1"}
    assert second["python"] == ".".join(map(str, sys.version_info[:3]))
    import torch

    assert second["packages"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert "unheard-of" not in second["packages"]
    assert second["host"] == os.uname().nodename
    assert second["time"] >= first["time"]


def test_run_records_every_state_of_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Code(origin="git", version="1", commit="a" * 40, dirty=False)
    two = Code(origin="git", version="1", commit="b" * 40, dirty=True)
    assert recorded_code(tmp_path) == ()
    for code, event in (
        (one, "start"),
        (one, "start"),
        (two, "launch"),
        (two, "start"),
        (one, "start"),
    ):
        monkeypatch.setattr(provenance, "source_code", lambda code=code: code)
        record(tmp_path, event=event)  # type: ignore[arg-type]
    assert recorded_code(tmp_path) == (one, two)
