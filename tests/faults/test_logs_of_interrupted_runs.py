"""TensorBoard and W&B of an interrupted run: one run with every value of metrics.jsonl."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.metrics.log import METRICS_FILE, WANDB_ID_FILE, read_metrics
from tests.distributed import DistributedError
from tests.faults.test_faults import ranks, saved
from tests.metrics.test_log import wandb_history
from tests.training.test_train import losses, small_run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def logged(output: Path) -> dict[tuple[str, int], float]:
    """Every number of metrics.jsonl by name (``train/lm_loss``) and step."""
    records = read_metrics(output / METRICS_FILE)
    found = [
        ((f"{record.kind}/{name}", record.step), value)
        for record in records
        for name, value in record.values.items()
    ]
    assert len(dict(found)) == len(found), "every step once"
    return dict(found)


@pytest.fixture(scope="module")
def interrupted(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps whose logging rank is killed in the fifth, after the save of the third."""
    pytest.importorskip("wandb")
    output = tmp_path_factory.mktemp("logs") / "run"
    run = small_run(
        small_data, output, "logging.wandb_project=mellum", "logging.wandb_name=interrupted"
    )
    with pytest.MonkeyPatch.context() as environment:
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            environment.delenv(name, raising=False)
        with pytest.raises(DistributedError, match=r"exit codes \[(1|-9), -9\]"):
            ranks("signalled", run, 1, 5, signal.SIGKILL)
        assert (saved(output)[-1], max(losses(output))) == (3, 4)
        assert ranks("train", run) == [True, True]
    return output


def test_tensorboard_shows_every_step_once(interrupted: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((interrupted / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(interrupted / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    shown = [
        ((tag, event.step), event.value)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    ]
    assert len(dict(shown)) == len(shown)
    expected = logged(interrupted)
    assert dict(shown).keys() == expected.keys()
    assert len(expected) > 20
    assert all(value == pytest.approx(expected[key], rel=1e-6) for key, value in shown)


def test_wandb_has_one_run_with_every_step(interrupted: Path) -> None:
    """Offline each start writes one transaction log; the newest holds all steps of the run.

    What the killed process had logged in its last seconds is in no log of its own (wandb 0.31
    flushes every 15 s).
    """
    identity = (interrupted / WANDB_ID_FILE).read_text().strip()
    files = sorted(
        (interrupted / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.parent.name
    )
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    rows = [row for row in wandb_history(files[-1]) if "step" in row]
    shown = [
        ((name, row["step"]), value) for row in rows for name, value in row.items() if "/" in name
    ]
    assert len(dict(shown)) == len(shown)
    assert dict(shown) == logged(interrupted)
