"""Load of the ranks that share the experts: its value by hand, and the event of a hot rank."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mellum2_megatron.recipes import recipe
from mellum2_megatron.training import metrics as training_metrics
from mellum2_megatron.training.metrics import HOT_RANK, HOTTEST_RANK, TrainingMetrics

Of = Callable[[int, int, list[dict[str, float]]], TrainingMetrics]


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Of:
    """Metrics of a rank: experts divided among ``ranks``, in one of ``stages`` pipeline stages."""

    def make(ranks: int, stages: int, others: list[dict[str, float]]) -> TrainingMetrics:
        state = SimpleNamespace(
            get_expert_model_parallel_world_size=lambda: ranks,
            get_pipeline_model_parallel_world_size=lambda: stages,
            get_pipeline_model_parallel_group=lambda: None,
        )
        monkeypatch.setattr(training_metrics, "parallel_state", state)

        def gather(parts: list[Any], mine: Any, group: None) -> None:
            parts[:] = [mine, *others]

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        found = TrainingMetrics(recipe("mellum2_tiny_pretrain"))
        found._routers = [router(1, [10, 30, 20, 20]), router(2, [40, 20, 10, 10])]
        return found

    return make


def router(layer: int, counts: list[int]) -> Any:
    return SimpleNamespace(
        layer_number=layer, is_mtp_layer=False, last_global_load=torch.tensor(counts).float()
    )


def test_the_hottest_rank_is_that_of_all_layers_together(metrics: Of) -> None:
    """Of 80 tokens a layer, experts 0 and 1 on the first rank got 40 and 60: 50 on average."""
    load = metrics(2, 1, [])._expert_load()
    assert load[HOTTEST_RANK] == pytest.approx(50 / 40)
    # The busiest expert of a layer is another figure.
    assert load["expert_load/layer_01/max_over_mean"] == pytest.approx(2.0)
    # With one expert a rank the hottest one has 25 of 20: (10 + 40) / 2.
    assert metrics(4, 1, [])._expert_load()[HOTTEST_RANK] == pytest.approx(25 / 20)


def test_without_expert_parallelism_there_is_none(metrics: Of) -> None:
    assert HOTTEST_RANK not in metrics(1, 1, [])._expert_load()


@pytest.mark.parametrize(("other", "worst"), [(1.1, 1.25), (1.4, 1.4)])
def test_of_pipeline_stages_the_worst_counts(metrics: Of, other: float, worst: float) -> None:
    load = metrics(2, 2, [{HOTTEST_RANK: other}])._expert_load()
    assert load[HOTTEST_RANK] == pytest.approx(worst)
    assert "expert_load/layer_00/max_over_mean" in load


def test_a_hot_rank_is_an_event_once_and_again_when_it_grows(metrics: Of) -> None:
    events: list[tuple[int, dict[str, float]]] = []
    found = metrics(2, 1, [])
    found._log = SimpleNamespace(  # type: ignore[assignment]  # of a log, what is used
        log_event=lambda step, note, values: events.append((step, values))
    )
    for step, load in enumerate((HOT_RANK, 1.6, 1.7, 1.8, 1.0, 1.9)):
        found._watch_hottest_rank(step, load)
    assert events == [
        (1, {"hottest_rank_over_mean": 1.6}),
        (3, {"hottest_rank_over_mean": 1.8}),
    ]
