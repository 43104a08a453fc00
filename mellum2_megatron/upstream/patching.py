"""Named, versioned replacements of upstream objects, applied the moment the upstream module has
been imported.

A `Patch` says what is replaced, which upstream fact makes it necessary and for which versions that
fact was read. `install` takes a table of them. Modules that are imported already are patched at
once; the others right after they have executed, before any other module can do ``from x import y``.
Names that other modules of the same distribution bound earlier (import cycles) are rebound, so one
entry per upstream object is enough.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

from mellum2_megatron.common.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """One replacement of one upstream object.

    Attributes:
        name: unique within all tables; the tests and the logs use it.
        target: ``module:attribute`` or ``module:Class.attribute``.
        replacement: given the original object, returns the one to put in its place.
        why: the upstream fact, with file and line.
        versions: the versions of ``distribution`` for which ``why`` was read, a PEP 440 specifier.
        distribution: the distribution that ``target`` belongs to.
    """

    name: str
    target: str
    replacement: Callable[[Any], Any]
    why: str
    versions: str = "==0.19.2"
    distribution: str = "megatron-core"

    @property
    def module(self) -> str:
        """Name of the module that holds the target."""
        return self.target.partition(":")[0]

    @property
    def attribute(self) -> str:
        """Dotted path of the target inside its module."""
        return self.target.partition(":")[2]

    def check_version(self) -> None:
        """Raise InputError when the installed distribution is not one that `why` was read in."""
        installed = importlib.metadata.version(self.distribution)
        if not SpecifierSet(self.versions).contains(installed, prereleases=True):
            raise InputError(
                f"{self.distribution} {installed}",
                rule=f"the work-around {self.name!r} was written for {self.distribution} {self.versions}",
                fix=f"install {self.distribution}{self.versions}",
            )

    def apply(self) -> None:
        """Replace the target, whose module must be imported, wherever its distribution has bound
        it. Idempotent."""
        if self.name in _applied:
            return
        owner: Any = sys.modules[self.module]
        *path, last = self.attribute.split(".")
        for step in path:
            owner = getattr(owner, step)
        original = owner.__dict__[last]  # not getattr: a classmethod must stay one
        replacement = self.replacement(original)
        setattr(owner, last, replacement)
        if not path and callable(original):
            _rebind(last, original, replacement, root=self.module.partition(".")[0])
        _applied.add(self.name)
        logger.debug("patched %s (%s)", self.target, self.name)


_applied: set[str] = set()


def _rebind(name: str, old: Any, new: Any, *, root: str) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(root + ".") and getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls back right after a module of interest has executed."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callable[[], None]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        callbacks = self.callbacks.get(fullname)
        if not callbacks:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for callback in callbacks:
                callback()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_after_import = _AfterImport()


def check_versions(patches: Iterable[Patch]) -> None:
    """Raise InputError for the first patch that was not written for the installed version of its
    distribution."""
    for patch in patches:
        patch.check_version()


def install(patches: Iterable[Patch]) -> None:
    """Apply every patch now or, where its module is not imported yet, as soon as it is.

    Raises:
        InputError: an installed version is not one the patch was written for. Nothing has been
            patched then.
    """
    table = list(patches)
    check_versions(table)
    if _after_import not in sys.meta_path:
        sys.meta_path.insert(0, _after_import)
    for patch in table:
        if patch.module in sys.modules:
            patch.apply()
        else:
            waiting = _after_import.callbacks.setdefault(patch.module, [])
            if patch.apply not in waiting:
                waiting.append(patch.apply)
