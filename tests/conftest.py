"""Fixtures for all tests. GPUs are hidden and the CPU backend is active, on every machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import parameter_id
from tests.distributed import hide_gpus

if TYPE_CHECKING:
    from mellum2_megatron.data.prepared_folder import PreparedData

# Before anything asks torch for a GPU: the answer is kept.
hide_gpus(os.environ)

from mellum2_megatron import cpu  # noqa: E402

# Activation is refused once megatron is imported, which most test modules do at the top.
cpu.activate()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Return a text parameter's id without spaces, so that a shell needs no quotes for it."""
    if not isinstance(val, str) or " " not in val:
        return None  # pytest's own id
    name = parameter_id(val)
    # pytest escapes other characters itself.
    return name if name.isascii() and name.isprintable() else None


@pytest.fixture(autouse=True)
def _values_of_no_other_test() -> Iterator[None]:
    """Forget what a test left in Megatron's classes; the next run in the process would take it.

    A scale of router losses is copied into, which fails if the new one is `[1]` and the old one
    `[]` (megatron/core/transformer/moe/moe_utils.py:331-334, 0.19.2). The sums of MTP losses have a
    place for each layer of the first model
    (megatron/core/transformer/multi_token_prediction.py, `MTPLossLoggingHelper`).
    """
    yield
    if module := sys.modules.get("megatron.core.transformer.moe.moe_utils"):
        module.MoEAuxLossAutoScaler.main_loss_backward_scale = None
    if module := sys.modules.get("megatron.core.transformer.multi_token_prediction"):
        module.MTPLossLoggingHelper.tracker = {}


@pytest.fixture(scope="session")
def megatron_world() -> Iterator[None]:
    """Megatron's parallel state for one process, on the CPU."""
    with cpu.single_process():
        yield


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """A corpus of 30 files, for the runs of `tests.training.test_train`."""
    # Imported here, so that light tests can be collected without the training code.
    from tests.training.test_train import small_corpus

    return small_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def trained(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a run of six steps on two ranks with `layout.ep=2`; shared by tests, read-only."""
    from tests.training.test_train import small_run, train

    folder = train(small_run(small_data, tmp_path_factory.mktemp("run") / "straight"), nproc=2)
    before = _stamps(folder)
    yield folder
    assert _stamps(folder) == before, "a test has changed the run that all tests share"


def _stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of change of each file below `folder`."""
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}
