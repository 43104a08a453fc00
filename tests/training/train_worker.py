"""One rank of the training tests."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def train(run_file: str, order: Sequence[int] | None = None) -> None:
    """Train a resolved run on this rank.

    Args:
        run_file: YAML file of the run.
        order: take the micro-batches of each step in this order; one index for each of them.
    """
    from mellum2_megatron.checkpoint import read_run
    from mellum2_megatron.training import loop, rank_main

    if order is not None:
        loop.forward_step = _reordering(loop.forward_step, order)
    rank_main.train(read_run(Path(run_file)), device="cpu")


def announce(run_file: str) -> str:
    """Return the standard output of this rank until Megatron's loop, which does not run."""
    from mellum2_megatron.checkpoint import read_run
    from mellum2_megatron.training import loop, rank_main

    loop.run_loop = lambda *args, **kwargs: None
    with contextlib.redirect_stdout(io.StringIO()) as output:
        rank_main.train(read_run(Path(run_file)), device="cpu")
    return output.getvalue()


def _reordering(forward_step: Any, order: Sequence[int]) -> Any:
    iterators: dict[int, Iterator[Any]] = {}

    def step(data_iterator: Iterator[Any], model: Any, *rest: Any) -> Any:
        if id(data_iterator) not in iterators:
            iterators[id(data_iterator)] = _reordered(data_iterator, order)
        return forward_step(iterators[id(data_iterator)], model, *rest)

    return step


def _reordered(items: Iterator[Any], order: Sequence[int]) -> Iterator[Any]:
    while True:
        group = [next(items) for _ in order]
        yield from (group[index] for index in order)
