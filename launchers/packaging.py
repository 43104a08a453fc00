"""Package the code of a job.

It runs in place on the shared disk, or from an archive of the commit in the run folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import atomic_directory
from mellum2_megatron.common.provenance import (
    SNAPSHOT_FILE,
    Code,
    project_root,
    source_code,
    write_snapshot,
)

Packager = Literal["shared", "git"]

CODE_FOLDER = "code"
"""Folder in the run folder, with one folder for each packaged state of the code."""

_SHOWN = 5
"""Largest number of changed files in a message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """Code for a job.

    Attributes:
        folder: folder of the packages (``mellum2_megatron`` ..), for the job's ``PYTHONPATH``.
        code: commit and state of the code.
        notes: remarks for the person who submits, default none.
    """

    folder: Path
    code: Code
    notes: tuple[str, ...] = ()


def check_code(packager: Packager, *, allow_dirty: bool, root: Path | None = None) -> Code:
    """Return version, commit and state of the code. Writes nothing.

    Args:
        packager: ``shared`` or ``git``.
        allow_dirty: accept uncommitted changes.
        root: checkout, default that of the running code.

    Raises:
        InputError: uncommitted changes without ``allow_dirty``, or no checkout for ``git``.
    """
    root = root or project_root()
    code = source_code(root)
    if packager == "git" and code.origin != "git":
        raise InputError(
            "packager: git",
            rule=f"{root} is no checkout that Git can archive ({code.reason or code.origin})",
            fix="launch from a Git checkout of this project, "
            "or set packager: shared in the profile",
        )
    if code.dirty and not allow_dirty:
        changed, untracked = changes(root)
        raise InputError(
            f"uncommitted changes in {root}",
            rule=f"a job's code must be on record ({_listed((*changed, *untracked))})",
            fix="commit them, or launch with --allow-dirty",
        )
    return code


def changes(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the changed tracked files and the untracked files, relative to ``root``."""
    changed: list[str] = []
    untracked: list[str] = []
    # -z leaves names with blanks unquoted; --no-renames gives one name per entry.
    entries = _git(root, "status", "--porcelain", "-z", "--no-renames", "--", ".").split("\0")
    for entry in filter(None, entries):
        (untracked if entry.startswith("??") else changed).append(entry[3:])
    return tuple(changed), tuple(untracked)


def package(
    run_folder: Path,
    packager: Packager,
    *,
    allow_dirty: bool,
    root: Path | None = None,
    write: bool = True,
) -> Package:
    """Package the code of a job.

    ``git`` archives the commit into ``run_folder/code/COMMIT``. With ``allow_dirty`` it includes
    changes of tracked and staged files, in ``COMMIT-TREE``. An existing folder is never changed:
    jobs that wait or run keep their code.

    Args:
        run_folder: run folder.
        packager, allow_dirty, root: see `check_code`.
        write: write the archive, default True; False only returns its place.

    Raises:
        InputError: see `check_code`.
        WorkError: git fails.
    """
    root = root or project_root()
    code = check_code(packager, allow_dirty=allow_dirty, root=root)
    changed, untracked = changes(root) if code.dirty else ((), ())
    notes = []
    if packager == "shared":
        if code.dirty:
            notes.append(f"the code runs as it lies in {root}, uncommitted changes included")
        return Package(folder=root, code=code, notes=tuple(notes))
    if changed:
        notes.append(f"uncommitted changes are packaged: {_listed(changed)}")
    if untracked:
        notes.append(f"untracked files are not packaged: {_listed(untracked)}")
    tree = _tree(root, with_changes=bool(changed))
    assert code.commit is not None
    # The tree's hash tells two sets of uncommitted changes apart.
    name = f"{code.commit[:12]}-{tree[:12]}" if code.dirty else code.commit[:12]
    folder = run_folder.absolute() / CODE_FOLDER / name
    # The snapshot file is written last: a folder that has it is complete.
    if write and not (folder / SNAPSHOT_FILE).is_file():
        with (
            atomic_directory(folder, overwrite=True) as temporary,
            tempfile.TemporaryFile() as archive,
        ):
            # From the top: in a subfolder `git archive` would look for its path inside the tree.
            top = Path(_git(root, "rev-parse", "--show-toplevel").strip())
            _git(top, "archive", "--format=tar", tree, output=archive.fileno())
            archive.seek(0)
            with tarfile.open(fileobj=archive) as tar:
                tar.extractall(temporary, filter="tar")
            write_snapshot(temporary, code)
    return Package(folder=folder, code=code, notes=tuple(notes))


def _tree(root: Path, *, with_changes: bool) -> str:
    """Return the hash of Git's tree of ``root`` at HEAD, or with uncommitted changes."""
    # The project may be a subfolder of a larger repository.
    prefix = _git(root, "rev-parse", "--show-prefix").strip()
    if not with_changes:
        return _git(root, "rev-parse", f"HEAD:{prefix}").strip()
    with tempfile.TemporaryDirectory() as scratch:
        # A copy of the user's index, which stays as it is: it holds the new files that are staged.
        copy = Path(scratch) / "index"
        shutil.copyfile(root / _git(root, "rev-parse", "--git-path", "index").strip(), copy)
        index = {"GIT_INDEX_FILE": str(copy)}
        _git(root, "add", "--update", "--", ".", environment=index)
        repository_tree = _git(root, "write-tree", environment=index).strip()
    return _git(root, "rev-parse", f"{repository_tree}:{prefix}").strip()


def _git(
    root: Path,
    *words: str,
    environment: dict[str, str] | None = None,
    output: int = subprocess.PIPE,
) -> str:
    # Under a Git hook GIT_DIR, GIT_INDEX_FILE and the like may name another repository.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(root), *words],
        stdout=output,
        stderr=subprocess.PIPE,
        check=False,
        env={**inherited, "LC_ALL": "C", **(environment or {})},
    )
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise WorkError(
            f"git {words[0]} in {root} failed: {message}",
            fix="see what git says, or use packager: shared",
        )
    return (done.stdout or b"").decode(errors="surrogateescape")


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
