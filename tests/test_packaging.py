"""An installation: plain pins, all dependencies pinned, all packages shipped, no apex."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_namespace_packages

from tests import REPOSITORY
from tests.import_reader import TOPS

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
CONSTRAINTS = "constraints.txt"


def _pins(name: str) -> dict[str, str]:
    """Return package -> version of a constraints file."""
    lines = [
        line
        for line in (REPOSITORY / name).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), (
            f"{name}: {line!r} is not a plain pin"
        )
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def _requirements(*extras: str) -> list[Requirement]:
    """Return the project's requirements, with those of `extras` and of the extras in them."""
    project = PROJECT["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][name] for name in extras)]
    found: list[Requirement] = []
    for requirement in (Requirement(line) for lines in lists for line in lines):
        if requirement.name == project["name"]:
            found += _requirements(*requirement.extras)
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("extra", ["dev", "launch", "wandb", "notebook", "eval"])
def test_every_dependency_is_pinned_inside_its_range(extra: str) -> None:
    pins = _pins(CONSTRAINTS)
    for requirement in _requirements(extra):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{CONSTRAINTS} does not pin {requirement.name}"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement} excludes {version}"
        )


def test_apex_is_no_dependency() -> None:
    names = {
        canonicalize_name(r.name)
        for r in _requirements(*PROJECT["project"]["optional-dependencies"])
    }
    assert "apex" not in names | set(_pins(CONSTRAINTS))


def test_every_top_level_package_is_shipped() -> None:
    include = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert include == [f"{top}*" for top in TOPS]
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]
    shipped = set(find_namespace_packages(str(REPOSITORY), include=include))
    for top in TOPS:
        # Without this file a type checker of another project sees none of our annotations.
        assert (REPOSITORY / top / "py.typed").is_file()
        folders = {path.parent for path in (REPOSITORY / top).rglob("*.py")}
        assert {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders} <= shipped
