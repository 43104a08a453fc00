"""Fixtures for all tests. The CPU backend is active without a GPU, and not imported with one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests import parameter_id

if TYPE_CHECKING:
    from mellum2_megatron.data.prepared_folder import PreparedData

if not torch.cuda.is_available():
    from mellum2_megatron import cpu

    # Activation is refused once megatron is imported, which most test modules do at the top.
    cpu.activate()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Return a text parameter's id without spaces, so that a shell needs no quotes for it."""
    if not isinstance(val, str) or " " not in val:
        return None  # pytest's own id
    name = parameter_id(val)
    # pytest escapes other characters itself.
    return name if name.isascii() and name.isprintable() else None


@pytest.fixture(scope="session")
def megatron_world() -> Iterator[None]:
    """Megatron's parallel state for one process, without a GPU."""
    if torch.cuda.is_available():
        pytest.skip("the one-process CPU world is for machines without a GPU")
    from mellum2_megatron import cpu

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
