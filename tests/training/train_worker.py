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
FEW_ITEMS = {"completion": 2, "fim": 2, "arithmetic": 12}
"""Items of the tasks during training: text is decoded token by token."""
SCORES = "scores.json"
"""File in the run's folder: texts of the last call of `token_scores`, and what it returned."""


def train(run_file: str, order: Sequence[int] | None = None) -> None:
    """Train a resolved run on this rank.

    Args:
        run_file: YAML file of the run.
        order: take the micro-batches of each step in this order; one index for each of them.
    """
    from mellum2_megatron.checkpoint import read_run
    from mellum2_megatron.training import loop, rank_main, samples, tasks

    run = read_run(Path(run_file))
    if order is not None:
        loop.forward_step = _reordering(loop.forward_step, order)
    samples.greedy = _writing(samples.greedy, Path(str(run.checkpoint.output)) / SAMPLE_IDS)
    scored = Path(str(run.checkpoint.output)) / SCORES
    tasks.plan = _with_few_items(tasks.plan)
    tasks.token_scores = _writing_scores(tasks.token_scores, scored)
    rank_main.train(run, device="cpu")


def _with_few_items(plan: Any) -> Any:
    """Wrap `tasks.plan`: each task has the items of `FEW_ITEMS`."""
    return lambda architecture, names: plan(architecture, names, few_items(names))


def few_items(names: Sequence[str]) -> list[str]:
    """Return the settings of tasks with few items."""
    return [f"{name}.items={FEW_ITEMS[name]}" for name in names if name in FEW_ITEMS]


def _writing_scores(token_scores: Any, file: Path) -> Any:
    """Wrap `tasks.token_scores`: rank 0 writes texts and scores of the last call to a file."""

    def write(model: Any, texts: Sequence[Sequence[int]], **options: Any) -> Any:
        scores = token_scores(model, texts, **options)
        if os.environ["RANK"] == "0":
            plain = [[log.tolist(), most.tolist()] for log, most in scores]
            file.write_text(json.dumps([list(texts), plain]))
        return scores

    return write


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
