"""Miniature tasks that are scored while a model trains: `logging.eval_tasks`.

The measures are those of `mellum2 eval`, asked of the model in training (`TrainingModel`) in place
of an exported one. All ranks take part, see `training.decoding`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from mellum2_megatron.data.feed.entries import tokenizer_folder
from mellum2_megatron.evaluation import Continuation, Outcome, plan
from mellum2_megatron.evaluation.model import TokenizedModel, cut_at
from mellum2_megatron.training.decoding import after_steps, greedy, token_scores

if TYPE_CHECKING:
    from mellum2_megatron.config import Run

_PAD = 0
"""Fills sequences behind their text, where causal attention never sees it."""


class TrainingModel(TokenizedModel):
    """The model in training, as a measure asks it; see `evaluation.model.EvaluatedModel`.

    Args:
        model: model parts of this rank, in evaluation mode.
        run: a resolved run, whose data have a tokenizer.
    """

    def __init__(self, model: list[torch.nn.Module], run: Run) -> None:
        super().__init__(run.architecture, tokenizer_folder(run.data))
        self._model = model

    def log_probabilities(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return `[b, s - 1]` in nats, on the CPU."""
        return torch.stack([log for log, _ in self._scores(tokens.tolist())])

    def score_continuations(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Continuation]:
        """Return how the model takes each continuation of one prompt."""
        texts = [[*prompt, *continuation] for continuation in continuations]
        return [
            Continuation(
                log_probability=float(log[len(prompt) - 1 :].sum()),
                is_greedy=bool(most[len(prompt) - 1 :].all()),
            )
            for log, most in self._scores(texts)
        ]

    def continue_greedily(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[int]:
        """Return the most likely next tokens."""
        return self.continue_all([prompt], most=[max_new_tokens], stop=stop)[0]

    def continue_all(
        self, prompts: Sequence[Sequence[int]], *, most: Sequence[int], stop: Collection[int] = ()
    ) -> list[list[int]]:
        """Return the most likely next tokens after each prompt, all prompts at once."""
        continued = greedy(
            self._model,
            prompts,
            new=max(most),
            pad=_PAD,
            vocab_size=self.architecture.vocab_size,
        )
        return [cut_at(ids[:count], stop) for ids, count in zip(continued, most, strict=True)]

    def _scores(self, texts: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return token_scores(self._model, texts, pad=_PAD, vocab_size=self.architecture.vocab_size)


class TrainingTasks:
    """Scores the tasks of a run while it trains.

    Args:
        run: a resolved run.
        on_scores: called on every rank with the step and the outcome of each task.
        pause_watch: context manager in which the hang watch is off: no micro-batch of the training
            starts meanwhile.
    """

    def __init__(
        self,
        run: Run,
        *,
        on_scores: Callable[[int, Mapping[str, Outcome]], None],
        pause_watch: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._run, self._on_scores, self._pause_watch = run, on_scores, pause_watch
        self._planned = plan(run.architecture, run.logging.eval_tasks)

    def wrap_end_of_step(self, callbacks: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `post_training_step_callbacks`, called after each step on every rank."""

        interval, last = self._run.logging.eval_task_interval, self._run.schedule.train_steps
        return after_steps(
            callbacks,
            is_due=lambda step: bool(self._planned) and (step % interval == 0 or step == last),
            work=self._score,
            report=self._on_scores,
            pause_watch=self._pause_watch,
        )

    def _score(self, model: list[torch.nn.Module]) -> dict[str, Outcome]:
        """Return the outcome of each task by its name; the same on every rank."""
        asked = TrainingModel(model, self._run)
        return {one.measure.name: one.measure.run(asked, one.settings) for one in self._planned}
