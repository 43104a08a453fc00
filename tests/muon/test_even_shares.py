"""Dense Muon matrices in even shares: the same training as in whole shares, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from mellum2_megatron.config import Run, to_yaml
from mellum2_megatron.data.prepared_folder import PreparedData
from tests.checkpoint.test_checkpoints import at_step, equal, state
from tests.distributed import run_distributed
from tests.training.test_train import losses, small_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS = 4
SETTINGS = (
    "schedule.micro_batch_size=1",
    "execution.extra_arguments=[--ddp-bucket-size,50000]",
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
)
LOGGED = ("lm_loss", "mtp_loss", "aux_loss", "z_loss", "grad_norm")


def start(function: str, run: Run, *arguments: str) -> Path:
    """Run a function of `tests.muon.worker` on four ranks, and return the run's folder."""
    output = Path(str(run.checkpoint.output))
    output.mkdir(parents=True, exist_ok=True)
    file = output / "requested.yaml"
    file.write_text(to_yaml(run))
    run_distributed(f"tests.muon.worker:{function}", RANKS, str(file), *arguments, timeout=300)
    return output


@pytest.fixture(scope="module")
def runs(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of six steps of four ranks, in whole and in even shares."""
    folder = tmp_path_factory.mktemp("shares")
    return {
        shards: start(
            "train",
            small_run(
                small_data, folder / shards, *SETTINGS, f"optimizer.muon_dense_shards={shards}"
            ),
        )
        for shards in ("whole", "even")
    }


def test_training_is_the_same_to_the_bit(runs: dict[str, Path]) -> None:
    """Four ranks with sequences of their own, EP 2: logged values, weights, optimizer state."""
    for name in LOGGED:
        assert losses(runs["even"], name) == losses(runs["whole"], name), name
    for step in ("iter_0000003", "iter_0000006"):
        (whole, _), (even, _) = (state(runs[shards] / step) for shards in ("whole", "even"))
        assert any("momentum_buffer" in key for key in whole)
        assert equal(whole, even)


@pytest.mark.parametrize(("saved", "resumed"), [("whole", "even"), ("even", "whole")])
def test_checkpoints_move_both_ways(
    saved: str, resumed: str, runs: dict[str, Path], small_data: PreparedData, tmp_path: Path
) -> None:
    """What is loaded is what was saved, and three more steps end as without the change."""
    run = small_run(
        small_data,
        at_step(runs[saved], tmp_path / "run", 3),
        *SETTINGS,
        f"optimizer.muon_dense_shards={resumed}",
    )
    start("reload", run, str(tmp_path / "copy"))
    loaded = tmp_path / "copy" / "iter_0000003"
    for expected, found in (
        (runs[saved] / "iter_0000003", loaded),
        (runs[saved] / "iter_0000006", tmp_path / "run" / "iter_0000006"),
    ):
        assert equal(state(expected)[0], state(found)[0])
    for name in LOGGED:
        assert losses(tmp_path / "run", name) == losses(runs[saved], name), name
