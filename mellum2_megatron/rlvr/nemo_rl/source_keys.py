"""Keys that the configuration classes in a checkout of NeMo-RL declare.

Nothing of it is imported: its classes are read as text, so neither its packages nor its Python are
needed.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mellum2_megatron.common.errors import InputError, first_line

ROOT = ("nemo_rl.algorithms.grpo", "MasterConfig")
MORE = {"policy.generation": ("nemo_rl.models.generation.vllm.config", "VllmConfig")}
"""Sections whose annotation is a base class -> the class that is used."""

_OPEN = {"dict", "Dict", "Mapping", "Any"}


@dataclass
class SourceReader:
    """Reads classes of configuration in a checkout.

    Attributes:
        checkout: the checkout.
        files: files that were read, relative to it.
    """

    checkout: Path
    files: set[str] = field(default_factory=set)
    _trees: dict[str, ast.Module] = field(default_factory=dict)

    def keys(self) -> frozenset[str]:
        """Return all keys; one that ends in ``.*`` holds any others.

        Raises:
            InputError: the checkout has no such classes, or a file cannot be read as Python.
        """
        found = set(self._keys(*ROOT, ""))
        if not found:
            raise InputError(
                f"--checkout {self.checkout}",
                rule=f"{ROOT[0]} has no class {ROOT[1]} with fields",
                fix="check out a version of NeMo-RL that has one (docs/rlvr.md)",
            )
        for section, (module, name) in MORE.items():
            found |= set(self._keys(module, name, f"{section}."))
        return frozenset(found)

    def _tree(self, module: str) -> ast.Module | None:
        """Return a module, or None if the checkout has no such file."""
        if module not in self._trees:
            path = self.checkout / Path(*module.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if not file.is_file():
                return None
            self.files.add(file.relative_to(self.checkout).as_posix())
            try:
                self._trees[module] = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError) as error:
                raise InputError(
                    str(file),
                    rule=f"it must be Python that can be read ({first_line(error)})",
                    fix="repair the checkout, or use a newer Python",
                ) from error
        return self._trees[module]

    def _find(self, module: str, name: str) -> tuple[str, ast.ClassDef | ast.Assign] | None:
        """Return a class, or another name for some, with its module, through NeMo-RL's imports."""
        for node in _statements(self._tree(module)):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                return module, node
            if isinstance(node, ast.ImportFrom):
                source = self._imported(module, node)
                for alias in node.names:
                    if source.startswith("nemo_rl") and (alias.asname or alias.name) == name:
                        return self._find(source, alias.name)
        return None

    def _imported(self, module: str, node: ast.ImportFrom) -> str:
        """Return the full name of the module of an import."""
        if not node.level:
            return node.module or ""
        is_package = (self.checkout / Path(*module.split("."))).is_dir()
        parts = module.split(".")
        kept = len(parts) - node.level + is_package
        return ".".join([*parts[:kept], *([node.module] if node.module else [])])

    def _keys(
        self, module: str, name: str, prefix: str, around: tuple[str, ...] = ()
    ) -> Iterator[str]:
        """Yield the full keys of a class, of its bases and of the classes in its fields."""
        found = self._find(module, name)
        if found is None or name in around:
            return
        home, node = found
        if isinstance(node, ast.Assign):
            for other in _names(node.value):
                yield from self._keys(home, other, prefix, (*around, name))
            return
        for base in node.bases:
            if isinstance(base, ast.Name):
                yield from self._keys(home, base.id, prefix, (*around, name))
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            key = f"{prefix}{item.target.id}"
            yield key
            names = _names(item.annotation)
            if _OPEN & set(names):
                yield f"{key}.*"
            for inner in names:
                yield from self._keys(home, inner, f"{key}.", (*around, name))


def _statements(tree: ast.Module | None) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those under its conditions included."""
    waiting = [] if tree is None else tree.body[::-1]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            waiting += [*node.orelse[::-1], *node.body[::-1]]


def _names(annotation: ast.expr) -> list[str]:
    """Return the names in an annotation, those in quotes included; not the words of a Literal."""
    found: list[str] = []
    waiting: list[ast.AST] = [annotation]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.Name(id=name):
                found.append(name)
            case ast.Constant(value=str(text)):
                with contextlib.suppress(SyntaxError):  # a remark inside Annotated
                    waiting.append(ast.parse(text, mode="eval").body)
            case ast.Subscript(value=ast.Name(id="Literal")):
                pass
            case _:
                waiting += [one for one in ast.iter_child_nodes(node) if isinstance(one, ast.expr)]
    return found
