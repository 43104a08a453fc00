"""Work on batches in worker processes, in order: the result is the same for any number of them."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from mellum2_megatron.common.errors import WorkError

# Per worker: enough to keep it busy, few enough to bound memory.
_BATCHES_IN_FLIGHT = 4


def map_in_order[T, R](
    work: Callable[[T], R],
    batches: Iterable[T],
    *,
    workers: int,
    initialise: Callable[..., None],
    arguments: tuple[Any, ...],
    worker: str,
) -> Iterator[R]:
    """Yield the result of each batch, in their order.

    The batches are made in this process, as they are needed. Workers are spawned, not forked: a
    forked tokenizer may deadlock on its thread pool.

    Args:
        work: module-level function of a batch.
        batches: the batches.
        workers: number of processes.
        initialise: module-level function that each process calls first.
        arguments: its arguments.
        worker: name of a worker with its article, for messages.

    Raises:
        WorkError: a worker was killed.
    """
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=initialise,
        initargs=arguments,
    ) as pool:
        pending: deque[Future[R]] = deque()
        try:
            for batch in batches:
                pending.append(pool.submit(work, batch))
                if len(pending) >= workers * _BATCHES_IN_FLIGHT:
                    # The oldest, not the first to finish: the order is part of the result.
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise WorkError(
                f"{worker} was killed", fix="free memory or use fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
