"""Bad steps on one of two real ranks: skipped or recorded, and nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.checkpoint.folder import iteration_folder_name
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Stability
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.faults.loss_history import LossHistory
from mellum2_megatron.metrics.log import METRICS_FILE, Record, read_metrics
from mellum2_megatron.recipes import recipe, recipe_names
from tests.checkpoint.test_checkpoints import at_step, equal, state
from tests.distributed import DistributedError
from tests.faults.test_faults import ranks, saved
from tests.training.test_train import losses, small_run

real = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

EVERY_STEP = ["checkpoint.save_interval=1", "logging.eval_iterations=0"]
SKIP = [*EVERY_STEP, "stability.not_finite=skip"]
SPIKE = [*EVERY_STEP, "stability.spike_window=3"]
# An expert on both ranks sees both ranks' gradients. Overlapping, they are looked at during the
# backward pass.
ALL_EXPERTS = [
    "layout.ep=1",
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
]
SAMPLES = {1: 4, 2: 8, 3: 16, 4: 24, 5: 32, 6: 40}


def events(output: Path) -> list[Record]:
    """Events of the guard; those of settings that a resume changed name old and new value."""
    return [
        record
        for record in read_metrics(output / METRICS_FILE)
        if record.kind == "event" and " -> " not in record.note
    ]


def common(output: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = state(output / iteration_folder_name(step))[1][
        "common_state/shard_0_1"
    ][0]
    return found


def require_untouched(output: Path, step: int) -> None:
    """Require a step's checkpoint with unchanged weights and optimizer state, but a later step."""
    before, after = (
        state(output / iteration_folder_name(number))[0] for number in (step - 1, step)
    )
    assert any("momentum_buffer" in key for key in before)
    assert any("exp_avg" in key for key in before)
    assert equal(before, after)
    assert common(output, step)["opt_param_scheduler"]["num_steps"] == SAMPLES[step]
    assert common(output, step)["args"].consumed_train_samples == SAMPLES[step]
    run = read_run(output / "run.yaml")
    for number, rate in losses(output, "learning_rate").items():
        assert rate == pytest.approx(run.learning_rate(SAMPLES[number]), rel=1e-6), number


class TestOnRanks:
    pytestmark = real

    @pytest.mark.parametrize(
        ("what", "settings"), [("loss", []), ("gradient", ALL_EXPERTS)], ids=["loss", "gradient"]
    )
    def test_non_finite_update_is_skipped(
        self,
        what: str,
        settings: list[str],
        small_data: PreparedData,
        tmp_path: Path,
    ) -> None:
        output = tmp_path / "run"
        run = small_run(small_data, output, *SKIP, *settings)
        assert ranks("bad_steps", run, 1, [4], what) == [True, True]
        (event,) = events(output)
        assert event.step == 4
        assert event.note == f"the {what} is nan on rank 1: the update is skipped"
        assert {name: value for name, value in event.values.items() if name != "value"} == {
            "rank": 1,
            "samples": 24,
            "batch_size": 8,
            "skipped": 1,
        }
        assert math.isnan(event.values["value"])
        require_untouched(output, 4)
        assert not equal(state(output / "iter_0000004")[0], state(output / "iter_0000005")[0])
        assert sorted(losses(output, "grad_norm")) == [1, 2, 3, 5, 6]
        assert math.isnan(losses(output)[4]) == (what == "loss")
        assert all(math.isfinite(losses(output)[step]) for step in (5, 6))

        # Interrupted after the skipped step, it comes to the same end.
        again = at_step(output, tmp_path / "again", 4)
        assert ranks("train", small_run(small_data, again, *SKIP, *settings)) == [True, True]
        assert equal(state(output / "iter_0000006")[0], state(again / "iter_0000006")[0])
        for name in ("mtp_loss", "grad_norm", "learning_rate"):
            assert losses(again, name).items() >= {
                (step, value)
                for step, value in losses(output, name).items()
                if math.isfinite(value)
            }, name
        assert [event.step for event in events(again)] == [4]

    def test_skips_in_a_row_are_limited(self, small_data: PreparedData, tmp_path: Path) -> None:
        """Two in a row are allowed, and the count comes back with a checkpoint."""
        output = tmp_path / "run"
        # The second run is longer, so its rate rises again where the first one ended.
        longer = ("stability.max_skips=2", "schedule.rewarm_at=24")
        run = small_run(small_data, output, *SKIP, *longer)
        assert ranks(
            "bad_steps",
            small_run(small_data, output, *SKIP, "schedule.train_samples=24"),
            0,
            [3, 4],
            "loss",
        )
        with pytest.raises(DistributedError) as caught:
            ranks("bad_steps", run, 0, [5], "loss")
        assert (
            "step 5: the loss is nan on rank 0, after 2 skipped updates in a row; nothing was saved"
            in str(caught.value)
        )
        assert saved(output)[-1] == 4
        assert [event.note.partition(": ")[2] for event in events(output)] == [
            "the update is skipped",
            "the update is skipped",
            "the run stops",
        ]

    def test_first_update_cannot_be_skipped(self, small_data: PreparedData, tmp_path: Path) -> None:
        with pytest.raises(
            DistributedError, match="step 1: the loss is nan on rank 1; nothing was saved"
        ):
            ranks("bad_steps", small_run(small_data, tmp_path / "run", *SKIP), 1, [1], "loss")

    def test_a_spike_is_found_again_after_a_resume(
        self, small_data: PreparedData, tmp_path: Path
    ) -> None:
        """The loss history is in the checkpoint: the same step is skipped with the same figures."""
        output = tmp_path / "run"
        run = small_run(small_data, output, *SPIKE, "stability.spike=skip")
        ranks("bad_steps", run, 1, [5], "spike")
        (event,) = events(output)
        logged = losses(output)
        median = sorted(logged[step] for step in (2, 3, 4))[1]
        assert event.values["value"] == pytest.approx(logged[5], rel=1e-6)
        assert event.note.startswith(
            f"the loss is {logged[5]:.4f}, {logged[5] / median:.2f} times the median of 3 steps"
        )
        assert (event.step, event.values["skipped"], event.values.get("rank")) == (5, 1, None)
        require_untouched(output, 5)

        again = at_step(output, tmp_path / "again", 4)
        ranks(
            "bad_steps",
            small_run(small_data, again, *SPIKE, "stability.spike=skip"),
            1,
            [5],
            "spike",
        )
        assert events(again) == [event]
        assert equal(state(output / "iter_0000006")[0], state(again / "iter_0000006")[0])

        # On the way recorded only, and the end of the run; from the same checkpoint.
        recorded = at_step(output, tmp_path / "recorded", 4)
        ranks("bad_steps", small_run(small_data, recorded, *SPIKE), 1, [5], "spike")
        assert [(found.step, found.note.rpartition(": ")[2]) for found in events(recorded)] == [
            (5, "recorded")
        ]
        assert not equal(state(recorded / "iter_0000004")[0], state(recorded / "iter_0000005")[0])
        stopped = at_step(output, tmp_path / "stopped", 4)
        with pytest.raises(
            DistributedError,
            match=r"step 5: the loss is .* times the median of 3 steps; nothing was",
        ):
            ranks(
                "bad_steps",
                small_run(small_data, stopped, *SPIKE, "stability.spike=stop"),
                1,
                [5],
                "spike",
            )
        assert saved(stopped)[-1] == 4
        assert [found.note.rpartition(": ")[2] for found in events(stopped)] == ["the run stops"]


def test_loss_above_the_median_is_a_spike() -> None:
    history = LossHistory(window=4, factor=1.5)
    assert [history.add(loss) for loss in (1.0, 100.0, 2.0, 3.0)] == [
        None
    ] * 4  # not enough to judge
    assert history.add(4.0) == 2.5
    assert history.add(4.5) is None  # 1.5 times the median of 100, 2, 3, 4 is 5.25
    assert history.losses == [2.0, 3.0, 4.0, 4.5]
    again = LossHistory(window=4, factor=1.5, losses=history.losses)
    assert [again.add(loss) for loss in (5.25, 5.26)] == [None, None]
    assert again.add(9.0) == pytest.approx((4.5 + 5.25) / 2)


def test_a_loss_that_stays_up_becomes_normal() -> None:
    history = LossHistory(window=5, factor=1.3)
    found = [history.add(loss) is not None for loss in (*[1.0] * 5, *[2.0] * 6)]
    assert found == [False] * 5 + [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spike_factor": 1.0}, "stability.spike_factor=1.0: must be above 1"),
        ({"spike_window": 1}, "stability.spike_window=1: must be 2 or more"),
        ({"max_skips": 0}, "stability.max_skips=0: must be positive"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Stability(**values)


def test_recipes_record_spikes_and_stop_on_non_finite_values() -> None:
    for name in recipe_names():
        run = recipe(name)
        # The loss of a policy is around 0, so no multiple of it is a spike.
        spike = "ignore" if run.data.feed == "rollouts" else "record"
        assert (run.stability.not_finite, run.stability.spike) == ("stop", spike)
        if spike == "record":
            assert "§3.6" in str(run.source("stability.spike"))
