"""Packaged code: refusals, contents of an archive, and an unchanged checkout."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from launchers.packaging import check_code, package
from mellum2_megatron.common import provenance
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.provenance import source_code

FILES = {
    "mellum2_megatron/__init__.py": "",
    "mellum2_megatron/common/provenance.py": "",
    "mellum2_megatron/value.py": "VALUE = 1\n",
    "launchers/__init__.py": "",
    "with blank.txt": "x",
    ".gitignore": "ignored/\n",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "check out"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "first")
    return root


def git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *words], check=True, capture_output=True, text=True
    ).stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("packager", ["shared", "git"])
@pytest.mark.parametrize("name", ["mellum2_megatron/value.py", "new file.py"])
def test_uncommitted_changes_are_refused_and_named(
    checkout: Path, packager: str, name: str
) -> None:
    assert check_code(packager, allow_dirty=False, root=checkout).dirty is False
    (checkout / name).write_text("VALUE = 2\n")
    with pytest.raises(InputError, match="--allow-dirty") as refused:
        check_code(packager, allow_dirty=False, root=checkout)
    assert name in str(refused.value)
    assert check_code(packager, allow_dirty=True, root=checkout).dirty is True


def test_shared_code_stays_where_it_is(checkout: Path, tmp_path: Path) -> None:
    made = package(tmp_path / "run", "shared", allow_dirty=False, root=checkout)
    assert made.folder == checkout
    assert made.notes == ()
    assert not (tmp_path / "run").exists()


def test_an_archive_holds_the_commit_and_says_which(checkout: Path, tmp_path: Path) -> None:
    (checkout / "ignored").mkdir()
    (checkout / "ignored/big.bin").write_text("x")
    made = package(tmp_path / "run", "git", allow_dirty=False, root=checkout)
    assert made.folder.parent == tmp_path / "run/code"
    assert files(made.folder) == {*FILES, provenance.SNAPSHOT_FILE}
    assert all((made.folder / name).read_text() == text for name, text in FILES.items())
    told = json.loads((made.folder / provenance.SNAPSHOT_FILE).read_text())
    head = git(checkout, "rev-parse", "HEAD").strip()
    assert (told["commit"], told["dirty"]) == (head, False)
    # The job records the same, without a repository around it.
    code = source_code(made.folder)
    assert (code.origin, code.commit, code.dirty) == ("snapshot", head, False)


def test_allowed_changes_are_packaged_and_reported(checkout: Path, tmp_path: Path) -> None:
    (checkout / "mellum2_megatron/value.py").write_text("VALUE = 2\n")
    (checkout / "with blank.txt").unlink()
    (checkout / "launchers/new.py").write_text("")
    git(checkout, "add", "launchers/new.py")  # tracked from now on
    (checkout / "unknown.py").write_text("")
    before = git(checkout, "status", "--porcelain")
    made = package(tmp_path / "run", "git", allow_dirty=True, root=checkout)
    assert (made.folder / "mellum2_megatron/value.py").read_text() == "VALUE = 2\n"
    assert "with blank.txt" not in files(made.folder)
    assert "unknown.py" not in files(made.folder)
    assert "launchers/new.py" in files(made.folder)
    said = "\n".join(made.notes)
    assert "mellum2_megatron/value.py" in said
    assert "not packaged: unknown.py" in said
    assert made.code.dirty is True
    assert source_code(made.folder).dirty is True
    assert git(checkout, "status", "--porcelain") == before


def test_a_new_state_gets_a_folder_of_its_own(checkout: Path, tmp_path: Path) -> None:
    """A waiting job keeps the code of its submission."""
    first = package(tmp_path / "run", "git", allow_dirty=True, root=checkout).folder
    (checkout / "mellum2_megatron/value.py").write_text("VALUE = 2\n")
    second = package(tmp_path / "run", "git", allow_dirty=True, root=checkout).folder
    assert first != second
    assert (first / "mellum2_megatron/value.py").read_text() == "VALUE = 1\n"
    (checkout / "mellum2_megatron/value.py").write_text("VALUE = 1\n")
    assert package(tmp_path / "run", "git", allow_dirty=False, root=checkout).folder == first
    (checkout / "mellum2_megatron/value.py").write_text("VALUE = 2\n")
    git(checkout, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qam", "second")
    third = package(tmp_path / "run", "git", allow_dirty=False, root=checkout).folder
    assert third != second
    assert source_code(third).dirty is False


def test_a_project_inside_a_larger_repository(checkout: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    (checkout / ".git").rename(tmp_path / "elsewhere")
    checkout.rename(outer / "inner")
    (outer / "other.txt").write_text("x")
    git(outer, "add", "-A")
    git(outer, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "first")
    made = package(tmp_path / "run", "git", allow_dirty=False, root=outer / "inner")
    assert files(made.folder) == {*FILES, provenance.SNAPSHOT_FILE}
    (outer / "inner/mellum2_megatron/value.py").write_text("VALUE = 3\n")
    made = package(tmp_path / "run", "git", allow_dirty=True, root=outer / "inner")
    assert files(made.folder) == {*FILES, provenance.SNAPSHOT_FILE}
    assert (made.folder / "mellum2_megatron/value.py").read_text() == "VALUE = 3\n"


def test_git_needs_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="packager: shared"):
        check_code("git", allow_dirty=True, root=tmp_path)
    assert check_code("shared", allow_dirty=False, root=tmp_path).commit is None
