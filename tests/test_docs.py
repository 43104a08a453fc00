"""Files, modules, functions and package order named in the documentation exist."""

from __future__ import annotations

import ast
import re

import pytest

from mellum2_megatron.config import keys
from tests import REPOSITORY
from tests.import_reader import OUTER, modules, package
from tests.test_imports import AT_IMPORT, LEVELS

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *(REPOSITORY / "docs").rglob("*.md"),
    )
)
SUFFIXES = ("npz", "json", "jsonl", "yaml", "md", "py", "sh")
TOPS = ("mellum2_megatron", *OUTER, "tests", "benchmarks", "docs", "scripts")


def _names(page: str) -> set[str]:
    """Words of a page that may name a file, a module or a function."""
    return set(re.findall(r"[\w./-]*\w", (REPOSITORY / page).read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    paths = {
        name
        for name in _names(page)
        if re.fullmatch(rf"({'|'.join(TOPS)})/[\w./-]+\.(py|md|sh|png|yaml|txt)", name)
    }
    assert [path for path in sorted(paths) if not (REPOSITORY / path).is_file()] == []


def _defined(module: str) -> set[str]:
    """Names bound at the top of a module: definitions, assignments, imports."""
    bound = set()
    for node in ast.parse(modules()[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
    return bound


@pytest.mark.parametrize("page", PAGES)
def test_lines_have_at_most_100_columns(page: str) -> None:
    lines = (REPOSITORY / page).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_inside_the_repository_leads_somewhere(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
    folder = (REPOSITORY / page).parent
    assert [link for link in sorted(links) if not (folder / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_module_and_function_that_a_page_names_exists(page: str) -> None:
    settings = {".".join(key.split(".")[:end]) for key in keys() for end in (2, 3)}
    wrong = []
    for name in sorted(_names(page) - settings):
        # Pages leave out `mellum2_megatron.` where that reads better: `planning.rules.enforce`.
        top = name.partition(".")[0]
        full = name if top in ("mellum2_megatron", *OUTER) else f"mellum2_megatron.{name}"
        parts = full.split(".")
        if len(parts) < 3 or ".".join(parts[:2]) not in modules() or parts[-1] in SUFFIXES:
            continue
        prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        module = next(prefix for prefix in prefixes if prefix in modules())
        inside = parts[module.count(".") + 1 :]
        if inside and inside[0] not in _defined(module):
            wrong.append(name)
    assert wrong == []


def test_the_table_of_packages_is_the_tested_order() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| *(\d+) *\| *`(\w+)/` *\|[^|]*\|([^|]*)\|", text, re.MULTILINE)
    levels: dict[int, tuple[str, ...]] = {}
    for number, name, _ in rows:
        levels[int(number)] = (*levels.get(int(number), ()), name)
    assert levels == dict(enumerate(LEVELS, 1))
    light = {name for _, name, libraries in rows if libraries.strip() == "none"}
    assert light == {name for level in LEVELS for name in level} - set(map(package, AT_IMPORT))


def test_the_public_names_of_each_package_exist() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| `(\w+)/` \|.*\|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == sum(map(len, LEVELS))
    for row_package, names in rows:
        top = row_package if row_package in OUTER else f"mellum2_megatron.{row_package}"
        own = [module for module in modules() if f"{module}.".startswith(f"{top}.")]
        defined = set().union(*(_defined(module) for module in own))
        public = [name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", names)]
        assert [name for name in public if name not in defined] == [], row_package
