"""The dataset provider that Megatron calls for training and validation samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mellum2_megatron.checkpoint import output_folder
from mellum2_megatron.data.feed.continued_training import ContinuedTraining
from mellum2_megatron.data.feed.datasets import build_datasets, build_training_set, reads_data
from mellum2_megatron.data.feed.fixed_validation import FixedValidation
from mellum2_megatron.data.feed.redis_run import FAILURE_FILE, STREAM_FOLDER, keys_of, run_stream
from mellum2_megatron.data.feed.sources import check_data
from mellum2_megatron.data.feed.streamed_training import StreamedTraining

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from mellum2_megatron.config import Run

    Split = Dataset[dict[str, object]] | None


def dataset_provider(
    run: Run,
    after_load: Callable[[], None],
    on_validation_set: Callable[[FixedValidation | None], None],
    training_set_of: Callable[[int, int | None], Any] | None = None,
) -> Callable[..., object]:
    """Return Megatron's dataset provider: sample counts -> train, validation and test set.

    Args:
        run: a resolved run.
        after_load: called at the start of each call. Megatron calls the provider right after it has
            set the model up and restored a checkpoint, if any (training/training.py:1354, 0.19.2),
            and before the first step: there the rest of the run hooks into the loop.
        on_validation_set: called with the validation set of this rank at the end of each call.
        training_set_of: function of number of samples and virtual stage to a training set that is
            not read from data; default none.
    """

    def provide(
        samples: tuple[int, int, int], vp_stage: int | None = None
    ) -> tuple[Split, Split, None]:
        after_load()
        if training_set_of is not None:
            on_validation_set(None)
            return training_set_of(samples[0], vp_stage), None, None
        per_validation = run.logging.eval_iterations * run.eval_batch_size
        cache = None if run.data.cache is None else Path(run.data.cache)
        streamed = run.data.feed == "redis"
        # Zero samples: none is built.
        counts = (0 if streamed else samples[0] - run.data.first_sample, per_validation, 0)
        train_set, valid_set, _ = build_datasets(run, counts, vp_stage=vp_stage, cache=cache)
        if streamed:
            train_set = _streamed(run, samples[0], vp_stage)
        elif train_set is not None:
            train_set = _continued(run, train_set)
        if valid_set is not None and per_validation:
            valid_set = FixedValidation(valid_set, period=per_validation, length=samples[1])
        on_validation_set(valid_set)
        return train_set, valid_set, None

    # Built on every rank, with barriers inside; Megatron reads the mark (training.py:4547).
    provide.is_distributed = True  # type: ignore[attr-defined]  # functions take attributes
    return provide


def training_set(run: Run, *, cache: Path | None = None) -> Any:
    """Return the training samples from files, numbered as Megatron's sampler numbers them.

    Args:
        run: a resolved run.
        cache: see `build_datasets`.
    """
    samples = run.schedule.train_samples - run.data.first_sample
    return _continued(run, build_training_set(run, check_data(run), samples, cache=cache))


def _continued(run: Run, train_set: Any) -> Any:
    first = run.data.first_sample
    return ContinuedTraining(train_set, first=first) if first else train_set


def _streamed(run: Run, samples: int, vp_stage: int | None) -> StreamedTraining | None:
    """Return the streamed training set; None on ranks that read no data."""
    import torch
    from megatron.core.datasets.utils import Split

    data, folder = check_data(run), output_folder(run)
    if not reads_data(vp_stage, every_stage=data.document_attention):
        return None
    return StreamedTraining(
        run_stream(run, folder),
        keys_of(run, data, folder),
        samples,
        rank=torch.distributed.get_rank(),
        index_split=Split.train,
        failure=folder / STREAM_FOLDER / FAILURE_FILE,
    )
