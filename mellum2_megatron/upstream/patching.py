"""Named, versioned replacements of upstream objects, applied as upstream modules are imported.

A `Patch` holds the target, the upstream fact that makes it necessary, and the versions for which
that fact was read. `install` takes a table of them. Modules that are imported already are patched
at once. The others are patched right after they have executed, before another module can do
``from x import y``. Modules of the same distribution that bound the name earlier (import cycles)
are rebound, so one entry for each upstream object is enough.
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
        name: name in tests and logs, unique within all tables.
        target: ``module:attribute`` or ``module:Class.attribute``.
        replacement: function from the original object to the one to put in its place.
        why: the upstream fact, with file and line.
        versions: versions of ``distribution`` for which ``why`` was read, a PEP 440 specifier.
        distribution: distribution of the target.
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
        """Raise InputError if another version is installed than those in which `why` was read."""
        installed = importlib.metadata.version(self.distribution)
        if not SpecifierSet(self.versions).contains(installed, prereleases=True):
            raise InputError(
                f"{self.distribution} {installed}",
                rule=f"the work-around {self.name!r} was written for {self.distribution} "
                f"{self.versions}",
                fix=f"install {self.distribution}{self.versions}",
            )

    def apply(self) -> None:
        """Replace the target wherever its distribution has bound it. Idempotent.

        Its module must be imported.
        """
        if self.name in _applied:
            return
        owner: Any = sys.modules[self.module]
        *path, last = self.attribute.split(".")
        for step in path:
            owner = getattr(owner, step)
        original = owner.__dict__[last]  # not getattr: a classmethod must stay one
        replacement = self.replacement(original)
        setattr(owner, last, replacement)
        # Functions and classes only: an equal constant elsewhere need not be this one.
        if not path and callable(original):
            root = self.module.partition(".")[0] + "."
            for name, module in list(sys.modules.items()):
                bound = getattr(module, "__dict__", {}).get(last)
                if name.startswith(root) and bound is original:
                    setattr(module, last, replacement)
        _applied.add(self.name)
        logger.debug("patched %s (%s)", self.target, self.name)


_applied: set[str] = set()
"""Names of the patches that are in place in this process."""


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls functions right after a module has executed.

    Attributes:
        callbacks: module name -> functions to call.
    """

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
        # The loader is the module's own, with one method wrapped: source and data files stay
        # readable through it.
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for callback in callbacks:
                callback()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # on this one loader
        return spec


_after_import = _AfterImport()


def check_versions(patches: Iterable[Patch]) -> None:
    """Raise InputError for the first patch that was written for another version."""
    for patch in patches:
        patch.check_version()


def install(patches: Iterable[Patch]) -> None:
    """Apply every patch now, or as soon as its module is imported.

    Raises:
        InputError: an installed version is not one the patch was written for. Nothing is patched
            then.
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
