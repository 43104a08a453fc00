"""Import, a step of Megatron's training loop at learning rate 0, export: every byte is the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.convert import export_hf, import_hf
from conversion.torch_dist.reader import TorchDistReader
from mellum2_megatron.checkpoint import find_checkpoint
from tests.conversion.folders import load_tensors, write_folder
from tests.conversion.release_run import MODEL
from tests.distributed import run_distributed


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [{"expert_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    ids=["ep2", "pp2"],
)
def test_release_to_training_checkpoint_to_release(layout: dict[str, Any], tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", MODEL)
    import_hf(source, tmp_path / "release")
    run = tmp_path / "run"
    run_distributed(
        "tests.conversion.release_run:train_one_step",
        2,
        str(tmp_path / "release"),
        str(run),
        **layout,
    )
    shutil.copy(tmp_path / "release" / "architecture.json", run)

    checkpoint = find_checkpoint(run)
    assert checkpoint.iteration == 1
    skipped = TorchDistReader(checkpoint.iteration_dir).skipped
    assert skipped["optimizer state"] > 20
    assert skipped["random number generator state"] >= 1
    export_hf(run, tmp_path / "out")
    before, after = load_tensors(source), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
