"""The list of mutations fits the code: each old text is there once, each test exists.

`python -m tests.mutations` runs them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import REPOSITORY, mutations
from tests.mutation import Mutation
from tests.mutations import MUTATIONS, copy_tree, outcome


@pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "_")
)
def test_old_text_occurs_once(mutation: Mutation) -> None:
    text = (REPOSITORY / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    ast.parse(text.replace(mutation.old, mutation.new))
    assert (REPOSITORY / mutation.test[0]).is_file()


def test_names_are_distinct() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 29


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ([0, 1], "killed"),
        ([0, 0], "SURVIVED"),
        ([0, 4], "no verdict: pytest exits with 4"),
        ([1], "no verdict: without it, pytest exits with 1"),
    ],
)
def test_verdicts(
    codes: list[int], verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    seen: list[str] = []

    def run(test: tuple[str, ...], tree: Path) -> int:
        seen.append((tree / "a.py").read_text())
        return codes[len(seen) - 1]

    monkeypatch.setattr(mutations, "exit_code", run)
    mutation = Mutation(name="m", file="a.py", old="1", new="2", test=("t.py",))
    assert outcome(mutation, tmp_path, {}) == verdict
    assert seen == ["x = 1\n", "x = 2\n"][: len(codes)]
    assert (tmp_path / "a.py").read_text() == "x = 1\n"


def test_copy_holds_the_working_tree(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    for name in ("pyproject.toml", "tests/mutations.py", "mellum2_megatron/__init__.py"):
        assert (tmp_path / name).read_bytes() == (REPOSITORY / name).read_bytes()
