"""The dataset provider that Megatron calls for training and validation samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mellum2_megatron.data.feed.continued_training import ContinuedTraining
from mellum2_megatron.data.feed.datasets import build_datasets
from mellum2_megatron.data.feed.fixed_validation import FixedValidation

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from mellum2_megatron.config import Run

    Split = Dataset[dict[str, object]] | None


def dataset_provider(run: Run, after_load: Callable[[], None]) -> Callable[..., object]:
    """Return Megatron's dataset provider: sample counts -> train, validation and test set.

    Args:
        run: a resolved run.
        after_load: called at the start of each call. Megatron calls the provider right after it has
            set the model up and restored a checkpoint, if any (training/training.py:1354, 0.19.2),
            and before the first step: there the rest of the run hooks into the loop.
    """

    def provide(
        samples: tuple[int, int, int], vp_stage: int | None = None
    ) -> tuple[Split, Split, None]:
        after_load()
        per_validation = run.logging.eval_iterations * run.eval_batch_size
        cache = None if run.data.cache is None else Path(run.data.cache)
        counts = (samples[0] - run.data.first_sample, per_validation, 0)
        train_set, valid_set, _ = build_datasets(run, counts, vp_stage=vp_stage, cache=cache)
        if train_set is not None and run.data.first_sample:
            train_set = ContinuedTraining(train_set, first=run.data.first_sample)
        if valid_set is not None and per_validation:
            valid_set = FixedValidation(valid_set, period=per_validation, length=samples[1])
        return train_set, valid_set, None

    # Built on every rank, with barriers inside; Megatron reads the mark (training.py:4547).
    provide.is_distributed = True  # type: ignore[attr-defined]  # functions take attributes
    return provide
