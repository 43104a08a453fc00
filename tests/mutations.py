"""Would a test notice? Break the code in known ways, one at a time, and run the test that should.

    python -m tests.mutations                 # all: about half an hour on two cores
    python -m tests.mutations labels mask     # those with a word of these in their name
    python -m tests.mutations --list

Each mutation is made in a temporary copy of the working tree, never in the tree itself. A mutation
is killed when its test fails, and the same test passes in the copy without it. The exit code is 1
if one survived. CI does not run this; `tests/test_mutations.py` holds the list to the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests import REPOSITORY, mutation_list
from tests.mutation import Mutation
from tests.rlvr import mutations as rl_mutations

TESTS_FAILED = 1
"""pytest's exit code; 2 and above are errors of another kind."""

MUTATIONS = (*mutation_list.MUTATIONS, *rl_mutations.MUTATIONS)


def copy_tree(target: Path) -> None:
    """Copy the working tree: tracked files, and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)


def exit_code(test: Sequence[str], tree: Path) -> int:
    """Run pytest in a tree; return its exit code."""
    words = ["-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", *test]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tree,
        env={
            **os.environ,
            "PYTHONPATH": str(tree),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode


def outcome(mutation: Mutation, tree: Path, passing: dict[tuple[str, ...], int]) -> str:
    """Make one mutation in a tree, run its test, and undo it.

    Args:
        mutation, tree: the fault and the copy.
        passing: exit codes of tests in the copy without a fault, filled as needed.
    """
    if mutation.test not in passing:
        passing[mutation.test] = exit_code(mutation.test, tree)
    if passing[mutation.test]:
        return f"no verdict: without it, pytest exits with {passing[mutation.test]}"
    file = tree / mutation.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    code = exit_code(mutation.test, tree)
    file.write_text(text, encoding="utf-8")
    if code == TESTS_FAILED:
        return "killed"
    return "SURVIVED" if code == 0 else f"no verdict: pytest exits with {code}"


def main(words: Sequence[str]) -> int:
    """Run the mutations whose names have one of `words`, or all; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="show the names")
    parser.add_argument("words", nargs="*", help="part of a name; none: all mutations")
    options = parser.parse_args(words)
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not options.words or any(word in mutation.name for word in options.words)
    ]
    counts: dict[str, int] = {}
    passing: dict[tuple[str, ...], int] = {}
    with tempfile.TemporaryDirectory(prefix="mellum2-mutations-") as folder:
        if not options.list:
            copy_tree(Path(folder))
        for mutation in chosen:
            verdict = "" if options.list else outcome(mutation, Path(folder), passing)
            counts[verdict] = counts.get(verdict, 0) + 1
            sys.stdout.write(f"{mutation.name} ({mutation.file})  {verdict}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen)} mutations: {counts}\n" if not options.list else "")
    return int(set(counts) - {"", "killed"} != set())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
