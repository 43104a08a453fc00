"""Data, checkpoints and runs for the tests of the command line; to be read or copied."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.checkpoint import write_run_folder
from mellum2_megatron.checkpoint.folder import TRACKER_FILE
from mellum2_megatron.config import apply_overrides
from mellum2_megatron.recipes import recipe
from tests.cli.runner import PREPARE, SMALL, TINY, Result, mellum2, process
from tests.conversion.folders import write_folder
from tests.small import python_like


@pytest.fixture(autouse=True)
def _nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test whose `train`, meant to be refused, would start ranks."""

    def launch(*_: Any, **__: Any) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("launchers.local.run_ranks", launch)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for seed in range(40):
        (folder / f"module_{seed}.py").write_text(python_like(seed))
    return folder


@pytest.fixture(scope="session")
def prepare_result(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Folder and result of `data prepare`, run in a process of its own."""
    folder = tmp_path_factory.mktemp("data") / "corpus"
    return folder, process("data", "prepare", "--output", folder, "--input", texts, *PREPARE)


@pytest.fixture(scope="session")
def corpus(prepare_result: tuple[Path, Result]) -> Path:
    return prepare_result[0]


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="session")
def checkpoint(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron") / "model"
    result = mellum2("convert", "import", "--hf-path", hf_folder, "--megatron-path", folder)
    assert result.code == 0, result
    return folder


@pytest.fixture
def small_run(corpus: Path) -> list[str]:
    """Arguments of a `train` that would work."""
    return [TINY, *SMALL, f"data.path={corpus}", "--device", "cpu"]


@pytest.fixture
def run_folder(small_run: list[str], tmp_path: Path) -> Path:
    """Folder of a run trained to step 100, without the weights."""
    folder = tmp_path / "run"
    overrides = [*small_run[1:-2], f"checkpoint.output={folder}"]
    write_run_folder(apply_overrides(recipe(TINY), overrides))
    (folder / "iter_0000100").mkdir()
    (folder / "iter_0000100" / "metadata.json").write_text("{}")
    (folder / TRACKER_FILE).write_text("100")
    return folder


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Function that makes a file system of its own, with mount options (`size=1m`)."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk, where mounting is allowed at all")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)
