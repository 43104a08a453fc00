"""Texts that the model generates while it trains, from the same prompts each time.

See `training.decoding`: all ranks take part, and nothing of the training changes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from mellum2_megatron.data.feed.entries import tokenizer_folder
from mellum2_megatron.data.tokens.prompts import encode_prompts
from mellum2_megatron.data.tokens.tokenizer import special_ids
from mellum2_megatron.training.decoding import after_steps, greedy

if TYPE_CHECKING:
    import torch

    from mellum2_megatron.config import Run


class TrainingSamples:
    """Generates texts from the prompts of a run.

    Args:
        run: a resolved run.
        on_texts: called on every rank with the step and the ``(prompt, continuation)`` pairs.
        pause_watch: context manager in which the hang watch is off: no micro-batch of the training
            starts meanwhile.
    """

    def __init__(
        self,
        run: Run,
        *,
        on_texts: Callable[[int, list[tuple[str, str]]], None],
        pause_watch: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._run, self._on_texts, self._pause_watch = run, on_texts, pause_watch

    def wrap_end_of_step(self, callbacks: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `post_training_step_callbacks`, called after each step on every rank."""

        logging, last = self._run.logging, self._run.schedule.train_steps
        return after_steps(
            callbacks,
            is_due=lambda step: (
                bool(logging.sample_prompts)
                and (step % logging.sample_interval == 0 or step == last)
            ),
            work=self._generate,
            report=self._on_texts,
            pause_watch=self._pause_watch,
        )

    def _generate(self, model: list[torch.nn.Module]) -> list[tuple[str, str]]:
        """Continue every prompt; the same result on every rank."""
        from tokenizers import Tokenizer

        run, folder = self._run, tokenizer_folder(self._run.data)
        new = run.logging.sample_tokens
        prompts = encode_prompts(
            folder, run.logging.sample_prompts, longest=run.data.sequence_length - new
        )
        eos, tokenizer = (
            special_ids(folder)["eos"],
            Tokenizer.from_file(str(folder / "tokenizer.json")),
        )
        continued = greedy(model, prompts, new=new, pad=eos, vocab_size=run.architecture.vocab_size)
        texts = []
        for prompt, ids in zip(run.logging.sample_prompts, continued, strict=True):
            # Ids above the tokenizer's own belong to no text: a model may have spare ones.
            kept = ids[: ids.index(eos)] if eos in ids else ids
            texts.append((prompt, tokenizer.decode(kept, skip_special_tokens=False)))
        return texts
