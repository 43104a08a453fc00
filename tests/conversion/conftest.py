"""Folders and checkpoints shared by the conversion tests; treat them as read-only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conversion.convert import import_hf
from conversion.release.release import ReleaseResult, release
from tests.conversion.folders import write_folder
from tests.conversion.releases import TEMPLATE, write_model
from tests.small import python_like


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


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of extended context with a tokenizer, but no card, licence or chat template."""
    return write_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="session")
def chat_checkpoint(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Megatron checkpoint imported from `chat_model`."""
    target = tmp_path_factory.mktemp("chat_megatron") / "checkpoint"
    import_hf(chat_model, target)
    return target


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat template with a generation prompt, tools and a reasoning field."""
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def released(
    chat_checkpoint: Path, template: Path, tmp_path_factory: pytest.TempPathFactory
) -> ReleaseResult:
    """`chat_checkpoint` released as an instruct model, everything checked and run."""
    folder = tmp_path_factory.mktemp("released")
    text = folder / "text.py"
    text.write_text(python_like(1)[:500])
    return release(
        chat_checkpoint,
        folder / "instruct",
        member="instruct",
        chat_template=template,
        text=text,
        min_acceptance=0.0,
    )
