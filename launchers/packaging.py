"""The code that a job runs: as it lies on the shared disk, or an archive of the commit in the run's
folder."""

from __future__ import annotations

import os
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
"""In the folder of a run: one folder for each state of the code that was packaged."""

_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """Code for a job.

    Attributes:
        folder: holds the packages (``mellum2_megatron`` ..); goes on the job's ``PYTHONPATH``.
        code: commit and whether there were uncommitted changes.
        notes: what is worth telling the person who submits.
    """

    folder: Path
    code: Code
    notes: tuple[str, ...] = ()


def check_code(packager: Packager, *, allow_dirty: bool, root: Path | None = None) -> Code:
    """Return where the code in ``root`` (by default, the running code) comes from; nothing is
    written.

    Raises:
        InputError: it has uncommitted changes and ``allow_dirty`` is false, or ``git`` has no
            checkout to package.
    """
    root = root or project_root()
    code = source_code(root)
    if packager == "git" and code.origin != "git":
        raise InputError(
            "packager: git",
            rule=f"{root} is no checkout that Git can archive ({code.reason or code.origin})",
            fix="launch from a Git checkout of this project, or set packager: shared in the profile",
        )
    if code.dirty and not allow_dirty:
        changed, untracked = changes(root)
        raise InputError(
            f"uncommitted changes in {root}",
            rule=f"a job's code should be found again ({_listed((*changed, *untracked))})",
            fix="commit them, or launch with --allow-dirty",
        )
    return code


def changes(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the changed files that Git keeps, and those that it neither keeps nor ignores,
    relative to ``root``."""
    changed: list[str] = []
    untracked: list[str] = []
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
    """Make the code ready for a job, or, without ``write``, say what that would come to.

    ``git`` archives the commit into ``run_folder/code/COMMIT``; with ``allow_dirty`` changes of
    files that Git keeps go along, into ``COMMIT-TREE``. A folder is never changed once it is there,
    so a job that waits or runs keeps its code.

    Raises:
        InputError: see `check_code`.
        WorkError: git fails.
    """
    root = root or project_root()
    code = check_code(packager, allow_dirty=allow_dirty, root=root)
    changed, untracked = changes(root) if code.dirty else ((), ())
    if packager == "shared":
        notes = (
            [f"the code runs as it lies in {root}, uncommitted changes included"]
            if code.dirty
            else []
        )
        return Package(folder=root, code=code, notes=tuple(notes))
    notes = []
    if changed:
        notes.append(f"uncommitted changes are packaged: {_listed(changed)}")
    if untracked:
        notes.append(f"files that Git does not keep are not packaged: {_listed(untracked)}")
    tree = _tree(root, with_changes=bool(changed))
    assert code.commit is not None
    name = f"{code.commit[:12]}-{tree[:12]}" if code.dirty else code.commit[:12]
    folder = run_folder.absolute() / CODE_FOLDER / name
    if write and not (folder / SNAPSHOT_FILE).is_file():
        with atomic_directory(folder, overwrite=True) as temporary:
            _extract(root, tree, temporary)
            write_snapshot(temporary, code)
    return Package(folder=folder, code=code, notes=tuple(notes))


def _tree(root: Path, *, with_changes: bool) -> str:
    """Return Git's name for the files of ``root``: of HEAD, or with the changes of the files that
    Git keeps."""
    prefix = _git(root, "rev-parse", "--show-prefix").strip()
    if not with_changes:
        return _git(root, "rev-parse", f"HEAD:{prefix}").strip()
    with tempfile.TemporaryDirectory() as scratch:
        index = {
            "GIT_INDEX_FILE": str(Path(scratch) / "index")
        }  # the user's own index stays as it is
        _git(root, "read-tree", "HEAD", environment=index)
        _git(root, "add", "--update", "--", ".", environment=index)
        whole = _git(root, "write-tree", environment=index).strip()
    return _git(root, "rev-parse", f"{whole}:{prefix}").strip()


def _extract(root: Path, tree: str, folder: Path) -> None:
    with tempfile.TemporaryFile() as archive:
        # From the top: inside a subfolder `git archive` cuts the tree down to a path of that name.
        top = Path(_git(root, "rev-parse", "--show-toplevel").strip())
        _git(top, "archive", "--format=tar", tree, output=archive.fileno())
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            tar.extractall(folder, filter="tar")


def _git(
    root: Path,
    *words: str,
    environment: dict[str, str] | None = None,
    output: int = subprocess.PIPE,
) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(root), *words],
        stdout=output,
        stderr=subprocess.PIPE,
        check=False,
        env={**own, "LC_ALL": "C", **(environment or {})},
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise WorkError(
            f"git {words[0]} in {root} failed: {said}",
            fix="see what git says, or use packager: shared",
        )
    return (done.stdout or b"").decode(errors="surrogateescape")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )
