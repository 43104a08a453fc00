"""Imports point one way: the order of the packages, without circles, and light where a login node
needs it.

Every import statement of the source tree is read, those inside functions and under
``TYPE_CHECKING`` too. The order below is the one of docs/architecture.md. To see this test fail,
turn any import of the tree round.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import REPOSITORY

LEVELS: tuple[tuple[str, ...], ...] = (
    ("common",),
    ("architecture", "metrics"),
    ("config",),
    ("recipes", "data", "model"),
    ("checkpoint",),
    ("planning", "faults", "upstream"),
    ("cpu",),
    ("training", "conversion"),
    ("launchers",),
    ("ablations",),
    ("cli",),
)
"""A package imports from earlier lines only: not from a later one, and not from its own line."""

OUTER = ("conversion", "launchers", "ablations")
"""Packages beside `mellum2_megatron`; inside it only `cli` may import them."""

HEAVY = ("torch", "megatron", "transformers")

AT_IMPORT: dict[str, tuple[str, ...]] = {
    "mellum2_megatron.data.feed": ("torch",),
    "mellum2_megatron.model": ("torch", "megatron"),
    "mellum2_megatron.faults.step_guard": ("torch",),
    "mellum2_megatron.training.datasets": ("torch",),
    "mellum2_megatron.training.loop": ("torch", "megatron"),
    "mellum2_megatron.training.metrics": ("torch", "megatron"),
    "mellum2_megatron.training.step": ("torch", "megatron"),
    "mellum2_megatron.cpu": ("torch",),
    "conversion.bridge": ("torch", "megatron"),
    "conversion": ("torch",),
}
"""Modules that may load a heavy library as they are imported; all others load it in the function
that needs it."""

OLD_PATHS = {
    "mellum2_megatron.megatron_fields": "mellum2_megatron.architecture.megatron_fields",
    "mellum2_megatron.scoring": "mellum2_megatron.model.scoring",
    "mellum2_megatron.stages": "mellum2_megatron.planning.stage_chain",
    "conversion.fallback_config": "conversion.huggingface.fallback_config",
    "conversion.bridge_model": "conversion.bridge.model",
}
"""Modules kept under the path that older pages and checkpoints name; each imports its new place and
nothing else."""

LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}


@dataclass(frozen=True, slots=True)
class Import:
    """One import of the tree; `eager` if it runs when `source` is imported."""

    source: str
    target: str
    line: int
    eager: bool


@functools.cache
def modules() -> Mapping[str, Path]:
    """Dotted name -> file, of every module of the source tree."""
    found = {}
    for root in ("mellum2_megatron", *OUTER):
        for file in sorted((REPOSITORY / root).rglob("*.py")):
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


@functools.cache
def imports() -> tuple[Import, ...]:
    """Every import of one of our modules or of a heavy library."""
    return tuple(entry for name, file in modules().items() for entry in _imports_of(name, file))


def _imports_of(name: str, file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    eager = set(map(id, _eager_nodes(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{file}:{node.lineno}: relative import"
            # `from package import module` imports the module, `from module import name` the module
            # that has the name.
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [sub if sub in modules() else node.module for sub in submodules]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            targets = [
                arg.value
                for arg in node.args
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
        else:
            continue
        for target in dict.fromkeys(targets):
            if target in modules() or target.partition(".")[0] in (
                *HEAVY,
                "mellum2_megatron",
                *OUTER,
            ):
                yield Import(name, target, node.lineno, id(node) in eager)


def _eager_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not function bodies, not what only a type checker
    reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from _eager_nodes(node)


def package(module: str) -> str:
    """``mellum2_megatron.config.run`` -> ``config``; ``conversion.convert`` -> ``conversion``."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "mellum2_megatron" else top


def wrong_way(source: str, target: str) -> str | None:
    """Return why `source` must not import `target`; None if it may."""
    if source in OLD_PATHS or source == "mellum2_megatron.__main__":
        allowed = OLD_PATHS.get(source, "mellum2_megatron.cli")
        return None if target == allowed else f"an old path imports {allowed} and nothing else"
    mine, other = package(source), package(target)
    if target in OLD_PATHS:
        return f"an old path; the module is {OLD_PATHS[target]}"
    if mine == other:
        face = mine if mine in OUTER else f"mellum2_megatron.{mine}"
        return "a module does not import its own package's face" if target == face else None
    if target == "mellum2_megatron":
        return None
    if mine not in LEVEL or other not in LEVEL:
        return f"{mine if mine not in LEVEL else other} stands nowhere in the order of packages"
    if other in OUTER and mine not in (*OUTER, "cli"):
        return "inside mellum2_megatron only cli imports conversion, launchers or ablations"
    if LEVEL[other] >= LEVEL[mine]:
        return f"{mine} may import only packages before it in the order; {other} is not"
    return None


def arrows() -> list[tuple[str, str]]:
    """Imports between our own modules, each pair once, in order."""
    return sorted(
        {(entry.source, entry.target) for entry in imports() if entry.target in modules()}
    )


def test_every_package_has_its_place() -> None:
    found = {package(module) for module in modules() if module not in OLD_PATHS and "." in module}
    assert found - {"__main__"} == set(LEVEL) - {"ablations"} | ({"ablations"} & found)


def test_every_imported_module_exists() -> None:
    ours = ("mellum2_megatron", *OUTER)
    assert [
        entry
        for entry in imports()
        if entry.target.partition(".")[0] in ours and entry.target not in modules()
    ] == []


def test_imports_point_one_way() -> None:
    wrong = [
        f"{modules()[entry.source].relative_to(REPOSITORY)}:{entry.line}: {entry.target}: {why}"
        for entry in imports()
        if entry.target in modules() and (why := wrong_way(entry.source, entry.target))
    ]
    assert not wrong, "\n".join(wrong)


def test_any_import_between_packages_turned_round_is_found() -> None:
    between = [
        (a, b)
        for a, b in arrows()
        if package(a) != package(b) and a not in OLD_PATHS and "__main__" not in a
    ]
    assert len(between) > 100
    assert [f"{b} -> {a}" for a, b in between if wrong_way(b, a) is None] == []


def circles(pairs: list[tuple[str, str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other (Tarjan's strongly connected components of
    two or more)."""
    after: dict[str, list[str]] = {}
    for a, b in pairs:
        after.setdefault(a, []).append(b)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in after.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in sorted(after):
        if node not in index:
            visit(node)
    return groups


def test_no_circles_between_modules() -> None:
    assert circles(arrows()) == []


def test_any_import_between_modules_turned_round_is_found() -> None:
    pairs = arrows()
    missed = [
        f"{b} -> {a}"
        for a, b in pairs
        if a not in OLD_PATHS and wrong_way(b, a) is None and not circles([*pairs, (b, a)])
    ]
    assert missed == []


def row(module: str) -> str | None:
    """Return the first name of `AT_IMPORT` that covers `module`."""
    return next((name for name in AT_IMPORT if f"{module}.".startswith(f"{name}.")), None)


def test_heavy_libraries_load_only_where_the_table_says() -> None:
    direct: dict[str, set[str]] = {}
    for entry in imports():
        if entry.eager:
            direct.setdefault(entry.source, set()).add(entry.target)

    def loads(module: str) -> set[str]:
        seen, waiting, heavy = set[str](), [module], set[str]()
        while waiting:
            name = waiting.pop()
            seen.add(name)
            # Importing a.b.c runs a/__init__ and a/b/__init__ first.
            parts = name.split(".")
            faces = {".".join(parts[:end]) for end in range(1, len(parts))}
            targets = direct.get(name, set()) | faces
            heavy |= {target.partition(".")[0] for target in targets} & set(HEAVY)
            waiting += [target for target in targets if target in modules() and target not in seen]
        return heavy

    loaded: dict[str | None, dict[str, set[str]]] = {}
    for module in modules():
        if module not in OLD_PATHS and (heavy := loads(module)):
            loaded.setdefault(row(module), {})[module] = heavy
    assert loaded.pop(None, {}) == {}
    found = {name: set().union(*heavy.values()) for name, heavy in loaded.items()}
    assert found == {name: set(libraries) for name, libraries in AT_IMPORT.items()}


@pytest.mark.parametrize("library", HEAVY)
def test_light_packages_really_load_no_heavy_library(library: str) -> None:
    light = (
        "common",
        "architecture",
        "metrics",
        "config",
        "recipes",
        "checkpoint",
        "planning",
        "upstream",
    )
    names = [name for name in modules() if package(name) in light and name not in OLD_PATHS]
    code = f"import sys\nimport {', '.join(names)}\nprint({library!r} in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize(("old", "new"), OLD_PATHS.items())
def test_old_paths_still_work(old: str, new: str) -> None:
    text = modules()[old].read_text(encoding="utf-8")
    tree = ast.parse(text)
    names = [
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert names
    definitions = ast.parse(modules()[new].read_text(encoding="utf-8")).body
    defined = {
        node.name for node in definitions if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert set(names) <= defined
