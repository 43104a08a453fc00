"""Work-arounds that every user of the megatron-core 0.19.2 wheel needs, on a GPU as on a CPU."""

from __future__ import annotations

import os
from typing import Any

from mellum2_megatron import patching
from mellum2_megatron.errors import WorkError
from mellum2_megatron.patching import Patch


def _compile_helpers(original: Any) -> Any:
    def compile_helpers() -> None:
        """Check that the compiled dataset helpers, which the wheel ships, import."""
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError as error:
            raise WorkError(f"{error}", fix="x") from error

    return compile_helpers


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="compile-helpers",
        target="megatron.core.datasets.utils:compile_helpers",
        replacement=_compile_helpers,
        why="core/datasets/utils.py:25 runs make in a folder where the wheel has no Makefile, then exits the process",
    ),
)


def activate() -> None:
    os.environ.setdefault("NO_VCS_VERSION", "1")
    patching.install(PATCHES)


def quiet_upstream() -> None:
    pass
