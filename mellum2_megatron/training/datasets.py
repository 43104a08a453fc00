"""The dataset provider that Megatron calls for training and validation samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mellum2_megatron.config import Run


def dataset_provider(run: Run, loaded: Callable[[], None]) -> Any:
    """Return Megatron's dataset provider; the first of our functions to run after a checkpoint is
    `loaded`."""

    def provide(
        samples: tuple[int, int, int], vp_stage: int | None = None
    ) -> tuple[Any, Any, None]:
        from mellum2_megatron.data.feed.continued_training import ContinuedTraining
        from mellum2_megatron.data.feed.datasets import build_datasets
        from mellum2_megatron.data.feed.fixed_validation import FixedValidation

        loaded()
        per_validation = run.logging.eval_iterations * run.eval_batch_size
        cache = None if run.data.cache is None else Path(run.data.cache)
        counts = (samples[0] - run.data.first_sample, per_validation, 0)
        train_set, valid_set, _ = build_datasets(run, counts, vp_stage=vp_stage, cache=cache)
        if train_set is not None and run.data.first_sample:
            train_set = ContinuedTraining(train_set, first=run.data.first_sample)
        if valid_set is not None and per_validation:
            valid_set = FixedValidation(valid_set, period=per_validation, length=samples[1])
        return train_set, valid_set, None

    provide.is_distributed = True  # type: ignore[attr-defined]  # built on every rank, with barriers inside
    return provide
