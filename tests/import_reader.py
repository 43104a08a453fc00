"""Reads every import of the source tree from the files themselves, without running any.

Read are imports at the top of a module, inside functions, classes and `try` blocks, under
``TYPE_CHECKING``, and those written as strings: ``import_module("a.b")``, ``python -m a.b``.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import REPOSITORY

OUTER = ("conversion", "launchers", "ablations")
"""Packages beside `mellum2_megatron`."""

TOPS = ("mellum2_megatron", *OUTER)
HEAVY = ("torch", "megatron", "transformers")

# The functions that import a module by its name, whatever the name of their own module.
IMPORTERS = ("import_module", "__import__", "run_module")


@dataclass(frozen=True, slots=True)
class Import:
    """One import of the tree.

    Attributes:
        source, target: dotted names of modules; `target` may be a heavy library.
        names: names taken from `target` by ``from target import names``.
        line: line in the file of `source`.
        eager: the import runs when `source` is imported.
    """

    source: str
    target: str
    names: tuple[str, ...]
    line: int
    eager: bool


def package(module: str) -> str:
    """``mellum2_megatron.config.run`` -> ``config``; ``conversion.convert`` -> ``conversion``."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "mellum2_megatron" else top


def face(module: str) -> str:
    """``mellum2_megatron.config.run`` -> ``mellum2_megatron.config``: the package's own module."""
    name = package(module)
    return name if name in OUTER else f"mellum2_megatron.{name}"


@functools.cache
def modules() -> Mapping[str, Path]:
    """Dotted name -> file, of every module of the source tree."""
    files = {}
    for top in TOPS:
        for file in sorted((REPOSITORY / top).rglob("*.py")):
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            files[".".join(parts).removesuffix(".__init__")] = file
    return files


@functools.cache
def imports() -> tuple[Import, ...]:
    """Every import of one of our modules or of a heavy library."""
    return tuple(
        entry
        for name, file in modules().items()
        for entry in imports_in(name, file.read_text(encoding="utf-8"))
    )


def imports_in(source: str, text: str) -> Iterator[Import]:
    """Read the imports of module `source` from its `text`."""
    tree = ast.parse(text, source)
    eager = {id(node) for node in eager_nodes(tree)}
    # A string that is a statement of its own is a docstring: it may name any module.
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        # Modules, each with the names taken from it.
        targets: dict[str, list[str]] = {}
        if isinstance(node, ast.Import):
            targets = {alias.name: [] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative import; name the package"
            targets = _targets(str(node.module), [alias.name for alias in node.names])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORTERS:
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            written = [arg.value for arg in arguments if isinstance(arg, ast.Constant)]
            assert written, f"{source}:{node.lineno}: imports a module of a computed name"
            targets = {str(name): [] for name in written}
        elif isinstance(node, ast.Constant) and id(node) not in prose:
            # A module may write its own name, and a package's main module that of the package.
            own = (source, face(source))
            targets = {name: [] for name in _modules_run_by(node.value) if name not in own}
        # A name in a string imports nothing by itself: somebody runs it later.
        runs = id(node) in eager and not isinstance(node, ast.Constant)
        for target, names in targets.items():
            if target.partition(".")[0] in (*TOPS, *HEAVY):
                yield Import(source, target, tuple(names), node.lineno, eager=runs)


def _targets(module: str, names: list[str]) -> dict[str, list[str]]:
    """Split ``from module import names`` into submodules, imported themselves, and other names."""
    targets: dict[str, list[str]] = {}
    for name in names:
        if f"{module}.{name}" in modules():
            targets[f"{module}.{name}"] = []
        else:
            targets.setdefault(module, []).append(name)
    return targets


def _modules_run_by(value: object) -> list[str]:
    """Return our modules that a text runs: ``a.b``, ``a.b:name``, or ``python -m a.b`` in it."""
    if not isinstance(value, str):
        return []
    names = re.findall(r"^([\w.]+)(?::\w+)?$|-m ([\w.]+)", value)
    return [name for pair in names for name in pair if "." in name and name in modules()]


def eager_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Return nodes that run at import: no bodies of functions, no lines for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            # Decorators and default values do run.
            decorators = [] if isinstance(child, ast.Lambda) else child.decorator_list
            for part in (*decorators, child.args):
                yield part
                yield from eager_nodes(part)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            for part in child.orelse:
                yield part
                yield from eager_nodes(part)
        else:
            yield child
            yield from eager_nodes(child)
