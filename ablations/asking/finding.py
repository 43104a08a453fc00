"""Studies by name or file. The shipped ones are read as a user's own file is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ablations.asking.study import NAME, Study
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.own_python import execute_file

SHIPPED = Path(__file__).parents[1]
"""Folder of the studies of this project, a file each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedStudy:
    """A study with its name and file.

    Attributes:
        name: name of the file, without ``.py``; the folder of its results.
        file: the file.
        study: the study.
    """

    name: str
    file: Path
    study: Study


def shipped() -> Mapping[str, Path]:
    """Return the files of this project's studies by name, sorted."""
    return {
        file.stem: file for file in sorted(SHIPPED.glob("*.py")) if not file.stem.startswith("_")
    }


def find_study(word: str) -> NamedStudy:
    """Return a study.

    Args:
        word: name of a shipped study, or path of a Python file with one `Study`.

    Raises:
        InputError: an unknown name (the nearest is named), or a file that fails or holds no study.
    """
    if word.endswith(".py"):
        return read_study(Path(word).expanduser())
    files = shipped()
    if word not in files:
        raise InputError(
            f"ablation {word!r}",
            rule="there is no such ablation, and it is no .py file",
            fix=nearest(word, files),
        )
    return read_study(files[word])


def read_study(file: Path) -> NamedStudy:
    """Execute a file and return the study in it. Modules beside it can be imported by it.

    Raises:
        InputError: the file is unreadable, fails, or has not exactly one study; its name is none
            for a folder.
    """
    if NAME.fullmatch(file.stem) is None:
        raise InputError(
            str(file),
            rule="a study has the name of its file, in small letters, digits and _ . -",
            fix="rename the file",
        )
    if file.stem in sys.stdlib_module_names:
        raise InputError(
            str(file),
            rule=f"a module of Python has the name {file.stem}, and the trainings, which start in "
            "this folder, would import the study in its place",
            fix=f"rename the file, for example to {file.stem}_study.py",
        )
    module, _ = execute_file(file, "the file of a study")
    studies = [value for value in vars(module).values() if isinstance(value, Study)]
    if len(studies) != 1:
        raise InputError(
            str(file),
            rule=f"a file holds one study, this one holds {len(studies)}",
            fix="write STUDY = Study(...) (docs/ablations.md)"
            if not studies
            else "give each study a file of its own",
        )
    return NamedStudy(name=file.stem, file=file, study=studies[0])
