"""A run with every variant at once: it saves, resumes to the bit, and runs on other ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from conversion.exportable import ROUTER_BIAS
from mellum2_megatron.checkpoint.folder import write_tracker
from mellum2_megatron.data.prepared_folder import PreparedData
from tests.training.test_train import losses, small_run, train, weights

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VARIANT = [
    "architecture.mlp_layer_types=[sparse,dense]",
    "architecture.shared_expert_intermediate_size=48",
    "architecture.latent_attention={kv_lora_rank: 24, qk_nope_head_dim: 16, qk_rope_head_dim: 8, "
    "v_head_dim: 32}",
    "loss.aux_loss_type=none",
    "loss.bias_update_rate=0.01",
    "loss.capacity_factor=1.0",
    "layout.ep=2",
    "optimizer.muon_tp_mode=duplicated",
]
DROPPED = "expert_load/layer_02/dropped_share"


@pytest.fixture(scope="module")
def straight(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variant") / "straight"
    return train(small_run(small_data, folder, *VARIANT), nproc=2)


def resumed(straight: Path, data: PreparedData, folder: Path, *overrides: str) -> Path:
    """Train the last three of six steps anew from the checkpoint of the third."""
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "iter_0000006")
    write_tracker(folder, 3)
    return train(small_run(data, folder, *VARIANT, *overrides), nproc=2)


def test_a_variant_resumes_to_the_bit(straight: Path, small_data: PreparedData, tmp_path: Path):
    again = resumed(straight, small_data, tmp_path / "again")
    for name in ("lm_loss", "mtp_loss", "z_loss", "grad_norm", DROPPED):
        assert losses(again, name) == losses(straight, name), name
    expected, found = weights(straight), weights(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    biases = [tensor for key, tensor in found.items() if key.endswith(ROUTER_BIAS)]
    assert len(biases) == 3  # two sparse layers and MTP's
    # Six steps of 0.01 in one direction or the other.
    assert all(tensor.dtype == torch.float32 and tensor.abs().max() > 0 for tensor in biases)
    assert all((tensor / 0.01).sub((tensor / 0.01).round()).abs().max() < 1e-3 for tensor in biases)
    assert 0 < losses(straight, DROPPED)[1] < 0.5


def test_a_variant_trains_alike_without_expert_parallelism(
    straight: Path, small_data: PreparedData, tmp_path: Path
):
    """The same drops and the same losses: capacity is a matter of each rank's own tokens."""
    other = resumed(straight, small_data, tmp_path / "other", "layout.ep=1")
    assert losses(other, DROPPED)[4] == losses(straight, DROPPED)[4]
    assert losses(other)[4] == pytest.approx(losses(straight)[4], abs=1e-4)
    assert losses(other)[6] == pytest.approx(losses(straight)[6], abs=5e-3)
