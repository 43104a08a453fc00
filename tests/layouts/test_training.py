"""Twenty steps in training precision: layouts change the loss no more than BF16 rounding.

The yardstick is one process that groups the same sequences into other micro-batches, which rounds
every weight's gradient at other places. The order of micro-batches is no yardstick: it changes sums
in float32, a difference that BF16 weights do not keep.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion.convert import export_hf, import_hf
from mellum2_megatron.data.prepared_folder import PreparedData
from tests.training.test_train import losses, small_corpus, small_run, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SETTINGS = [
    "layout.ep=1",
    "schedule.batch_schedule=[[0,4]]",
    "schedule.micro_batch_size=1",
    "schedule.warmup_samples=4",
    "schedule.decay_samples=0",
    "logging.eval_iterations=0",
    "checkpoint.save_interval=100",
    # These two would depend on the layout by construction in their other settings.
    "loss.aux_loss_type=aux_loss",
    "optimizer.muon_tp_mode=duplicated",
]

LAYOUTS = {
    "tp2": ["layout.tp=2", "layout.sp=true"],
    "cp2": ["layout.cp=2"],
    "ep2": ["layout.ep=2"],
    "pp2_vpp2": ["layout.pp=2", "layout.vpp=2"],
}

Run20 = tuple[PreparedData, Path]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Run20:
    """Return the corpus, and weights that every layout loads: initial ones depend on the layout."""
    folder = tmp_path_factory.mktemp("start")
    data = small_corpus(folder)
    fresh = train(small_run(data, folder / "fresh", *SETTINGS, "schedule.train_samples=8"), nproc=1)
    export_hf(fresh, folder / "hf")
    import_hf(folder / "hf", folder / "start")
    return data, folder / "start"


def curve(
    start: Run20, folder: Path, *overrides: str, nproc: int = 1, order: list[int] | None = None
) -> list[float]:
    data, load = start
    run = small_run(
        data, folder, *SETTINGS, "schedule.train_samples=80", f"checkpoint.load={load}", *overrides
    )
    """Train for twenty steps and return the loss of each, in nats."""
    steps = losses(train(run, nproc=nproc, order=order))
    assert list(steps) == list(range(1, 21))
    return list(steps.values())


@pytest.fixture(scope="module")
def reference(start: Run20, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    losses_by_step = curve(start, tmp_path_factory.mktemp("reference") / "run")
    # It learns, so a difference would grow.
    assert losses_by_step[-1] < losses_by_step[0] - 1
    return losses_by_step


@pytest.fixture(scope="module")
def noise(start: Run20, reference: list[float], tmp_path_factory: pytest.TempPathFactory) -> float:
    """Return the largest difference of the loss that rounding alone makes, in nats."""
    folder = tmp_path_factory.mktemp("noise")
    regrouped = [
        curve(start, folder / str(size), f"schedule.micro_batch_size={size}") for size in (2, 4)
    ]
    return max(distance(other, reference) for other in regrouped)


def distance(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_order_of_micro_batches_is_no_noise(start: Run20, reference: list[float], tmp_path: Path):
    reordered = curve(start, tmp_path / "run", order=[2, 3, 0, 1])
    assert distance(reordered, reference) < 2e-6  # the order in which losses are summed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_alike(
    layout: str, start: Run20, reference: list[float], noise: float, tmp_path: Path
):
    divided = curve(start, tmp_path / "run", *LAYOUTS[layout], nproc=2)
    assert distance(divided, reference) < 2 * noise


def test_blockwise_muon_is_another_update(
    start: Run20, reference: list[float], noise: float, tmp_path: Path
):
    """Megatron's default under tensor parallelism orthogonalises each rank's part of a matrix."""
    blockwise = curve(
        start, tmp_path / "run", *LAYOUTS["tp2"], "optimizer.muon_tp_mode=blockwise", nproc=2
    )
    assert distance(blockwise, reference) > 4 * noise


def test_the_exact_global_loss_is_independent_of_ranks(start: Run20, noise: float, tmp_path: Path):
    """One process with two ranks' sequences in a micro-batch trains alike; coefficient 1."""
    balance = ["loss.aux_loss_type=global_aux_loss", "loss.aux_loss_coef=1.0"]
    exact = "loss.aux_loss_gradient=exact"
    one = curve(start, tmp_path / "one", *balance, "schedule.micro_batch_size=2")
    two = curve(start, tmp_path / "two", *balance, exact, nproc=2)
    assert distance(two, one) < 2 * noise
    half = curve(start, tmp_path / "half", *balance, nproc=2)  # upstream: half the gradient
    assert distance(half, one) > 4 * noise
