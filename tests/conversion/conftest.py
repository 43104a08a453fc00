"""Folders and checkpoints shared by the conversion tests; treat them as read-only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conversion.convert import import_hf
from tests.conversion.folders import write_folder


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with MTP, bfloat16, one file."""
    return write_folder(tmp_path_factory.mktemp("hf") / "small")


@pytest.fixture(scope="session")
def checkpoint(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Megatron checkpoint imported from `hf_folder`."""
    target = tmp_path_factory.mktemp("megatron") / "small"
    import_hf(hf_folder, target)
    return target


@pytest.fixture
def hf_copy(hf_folder: Path, tmp_path: Path) -> Path:
    """A copy of `hf_folder` to damage."""
    return Path(shutil.copytree(hf_folder, tmp_path / "copy"))


@pytest.fixture
def checkpoint_copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `checkpoint` to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
