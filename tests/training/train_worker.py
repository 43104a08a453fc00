"""One rank of the training tests."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SAMPLE_IDS = "sample_ids.json"
"""File in the run's folder: ids of the prompts and of the texts of the last step."""


def train(run_file: str, order: Sequence[int] | None = None) -> None:
    """Train a resolved run on this rank.

    Args:
        run_file: YAML file of the run.
        order: take the micro-batches of each step in this order; one index for each of them.
    """
    from mellum2_megatron.checkpoint import read_run
    from mellum2_megatron.training import loop, rank_main, samples

    run = read_run(Path(run_file))
    if order is not None:
        loop.forward_step = _reordering(loop.forward_step, order)
    samples.greedy = _writing(samples.greedy, Path(str(run.checkpoint.output)) / SAMPLE_IDS)
    rank_main.train(run, device="cpu")


def _writing(greedy: Any, file: Path) -> Any:
    """Wrap `samples.greedy`: rank 0 writes the prompts' ids and their continuations to a file."""

    def write(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> Any:
        continued = greedy(model, prompts, **options)
        if os.environ["RANK"] == "0":
            file.write_text(json.dumps([list(prompts), continued]))
        return continued

    return write


def announce(run_file: str) -> str:
    """Return the standard output of this rank until Megatron's loop, which does not run."""
    from mellum2_megatron.checkpoint import read_run
    from mellum2_megatron.training import loop, rank_main

    loop.run_loop = lambda *args, **kwargs: None
    with contextlib.redirect_stdout(io.StringIO()) as output:
        rank_main.train(read_run(Path(run_file)), device="cpu")
    return output.getvalue()


def draws(run_file: str) -> int:
    """Train as `train` does, and return how often weights were drawn by name."""
    from mellum2_megatron.model import provider

    drawn: list[int] = []
    draw = provider.draw_by_name

    def counted(model: Any, config: Any, seed: int) -> None:
        drawn.append(seed)
        draw(model, config, seed)

    provider.draw_by_name = counted
    train(run_file)
    return len(drawn)


def _reordering(forward_step: Any, order: Sequence[int]) -> Any:
    iterators: dict[int, Iterator[Any]] = {}

    def step(data_iterator: Iterator[Any], model: Any, *rest: Any, **options: Any) -> Any:
        if id(data_iterator) not in iterators:
            iterators[id(data_iterator)] = _reordered(data_iterator, order)
        return forward_step(iterators[id(data_iterator)], model, *rest, **options)

    return step


def _reordered(items: Iterator[Any], order: Sequence[int]) -> Iterator[Any]:
    while True:
        group = [next(items) for _ in order]
        yield from (group[index] for index in order)
