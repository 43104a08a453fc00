"""Notebooks run as they are, on a small run, and are stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests import REPOSITORY
from tests.checkpoint.test_run_list import RUN, START, folder_of

NOTEBOOKS = REPOSITORY / "docs" / "notebooks"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with 12 steps, loads of two layers, a validation, a text and an incident."""
    folder = folder_of(tmp_path / "run", START)
    lines: list[dict[str, object]] = [
        {
            "kind": "train",
            "step": step,
            "lm_loss": 6.0 - step / 10,
            "grad_norm": 1.0 + step / 8,
            "learning_rate": 1e-3,
            "samples": 4.0 * step,
            "tokens": 256.0 * step,
            "expert_load/layer_00/max_over_mean": 1.5,
            "expert_load/mtp/max_over_mean": 1.25,
        }
        for step in range(1, 13)
    ]
    lines += [
        {"kind": "valid", "step": 12, "lm_loss": 4.9},
        {"kind": "sample", "step": 12, "prompt": "def f(", "note": "x):\n    return x"},
        {"kind": "event", "step": 12, "note": "the loss is nan on rank 0"},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_is_looked_at(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MELLUM2_RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(NOTEBOOKS / "look_at_a_run.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(run)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    # 1 + 12 / 8: the largest of the norms above.
    assert "12 steps, largest gradient norm 2.500" in printed
    assert "--- step 12\ndef f(x):\n    return x\n" in printed
    assert "the loss is nan on rank 0" in printed
    data = [output["data"] for output in outputs if "data" in output]
    assert sum("image/png" in each for each in data) == 3
    assert any(f"'recipe': '{RUN.name}'" in each.get("text/plain", "") for each in data)


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_a_notebook_is_valid_and_stored_without_outputs(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)
