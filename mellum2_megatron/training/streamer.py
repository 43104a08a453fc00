"""The streamer of a run: reads its training samples from files and streams them through Redis."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from mellum2_megatron import upstream
from mellum2_megatron.checkpoint import StartingPoint, output_folder
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run
from mellum2_megatron.data.feed.redis_run import keys_of, run_stream
from mellum2_megatron.data.feed.redis_streamer import Streamer
from mellum2_megatron.data.feed.sources import check_data

logger = logging.getLogger(__name__)


def stream(run: Run, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Stream the training samples of `run` until told to stop, from the resumed sample on.

    Raises:
        InputError: the run has another feed, its data are bad, or the server refuses.
    """
    if run.data.feed != "redis":
        raise InputError(
            f"data.feed={run.data.feed}",
            rule="the run reads its samples from files",
            fix="set data.feed=redis",
        )
    folder = output_folder(run)
    settings = run_stream(run, folder)
    keys = keys_of(run, check_data(run), folder)
    start = StartingPoint.of(run)
    first = run.data.first_sample if start.samples is None else start.samples
    # A finished run has no sample left.
    first = min(first, run.schedule.train_samples - 1)
    # Imports torch and Megatron's datasets, some seconds; all the above is refused before.
    upstream.quiet_upstream()
    from mellum2_megatron.data.feed.streamed_training import StreamSource
    from mellum2_megatron.training.datasets import training_set

    cache = None if run.data.cache is None else Path(run.data.cache)
    dataset = training_set(run, cache=cache)
    logger.warning(
        "streaming %d samples, plan %s, from sample %d to %s",
        len(dataset),
        keys.plan,
        first,
        settings.url,
    )
    Streamer(StreamSource(dataset), settings, keys, first=first).run(should_stop)
