"""Rollouts by transformers in the rank's own process, on the CPU: for small models.

Answers are sampled by inverting the distribution at random numbers that belong to prompt, answer
and position, so that they are the same in any batch and on any number of ranks, but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from conversion.live_weights import load_hf_weights, new_hf_model
from mellum2_megatron.rollouts.engine import Prompt, Sampled, check_sampled

if TYPE_CHECKING:
    from mellum2_megatron.architecture import Mellum2Architecture

_MOST_ROWS = 256
"""Sequences that are written at a time."""


class TransformersEngine:
    """transformers' model with a copy of the weights.

    Args:
        architecture: the model.
        ends: tokens that end an answer.
        dtype: number format of its weights, default float32.
    """

    def __init__(
        self,
        architecture: Mellum2Architecture,
        ends: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._architecture, self._ends = architecture, torch.tensor(sorted(ends))
        with torch.random.fork_rng(devices=[]):  # its initial weights are drawn, and replaced
            self.model = new_hf_model(architecture, dtype)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy these weights; see `Engine.load`."""
        load_hf_weights(self.model, weights, self._architecture)

    def write(
        self, prompts: Sequence[Prompt], *, answers: int, max_tokens: int
    ) -> list[list[Sampled]]:
        """Return sampled answers; see `Engine.write`."""
        # Prompts of one length need no padding, which would round differently.
        by_length: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt.tokens), []).append(number)
        written: dict[int, list[Sampled]] = {}
        together = max(1, _MOST_ROWS // answers)
        for numbers in by_length.values():
            for first in range(0, len(numbers), together):
                some = numbers[first : first + together]
                rows = self._write([prompts[number] for number in some], answers, max_tokens)
                for place, number in enumerate(some):
                    written[number] = rows[place * answers : (place + 1) * answers]
        for number, prompt in enumerate(prompts):
            for one in written[number]:
                check_sampled(prompt.place, one)
        return [written[number] for number in range(len(prompts))]

    def close(self) -> None:
        """Do nothing: the model ends with its process."""

    @torch.no_grad()
    def _write(self, prompts: Sequence[Prompt], answers: int, max_tokens: int) -> list[Sampled]:
        """Return the answers to prompts of one length, those of a prompt side by side."""
        uniform_bt = torch.cat([_uniform(prompt.seed, answers, max_tokens) for prompt in prompts])
        tokens_bs = torch.tensor([prompt.tokens for prompt in prompts])
        cache: Any = None
        ids_bs = tokens_bs.repeat_interleave(answers, dim=0)
        rows = len(ids_bs)
        chosen_bt = torch.zeros(rows, max_tokens, dtype=torch.long)
        logp_bt = torch.zeros(rows, max_tokens)
        length_b = torch.full((rows,), max_tokens)
        ended_b = torch.zeros(rows, dtype=torch.bool)
        for step in range(max_tokens):
            output = self.model(
                input_ids=ids_bs, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = output.past_key_values
            logits_bv = output.logits[:, -1].float()
            next_b = _invert(logits_bv, uniform_bt[:, step])
            chosen_bt[:, step] = next_b
            logp_bt[:, step] = logits_bv.log_softmax(1).gather(1, next_b[:, None])[:, 0]
            ends_b = torch.isin(next_b, self._ends) & ~ended_b
            length_b = torch.where(ends_b, step + 1, length_b)
            ended_b |= ends_b
            if bool(ended_b.all()):
                break
            ids_bs = next_b[:, None]
        return [
            Sampled(
                tokens=tuple(chosen_bt[row, :length].tolist()),
                log_probabilities=tuple(logp_bt[row, :length].tolist()),
                ended=bool(ended_b[row]),
            )
            for row, length in enumerate(length_b.tolist())
        ]


def _uniform(seed: int, answers: int, max_tokens: int) -> torch.Tensor:
    """Return random numbers from 0 to 1 of a prompt's answers, float64 `[answers, t]`."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(answers, max_tokens, dtype=torch.float64, generator=generator)


def _invert(logits_bv: torch.Tensor, uniform_b: torch.Tensor) -> torch.Tensor:
    """Return the token at which the cumulative distribution passes a random number, `[b]`."""
    cumulative_bv = logits_bv.double().softmax(1).cumsum(1)
    # The last sum may be just below 1.
    aim_b1 = (uniform_b * cumulative_bv[:, -1])[:, None]
    return torch.searchsorted(cumulative_bv, aim_b1, right=True)[:, 0].clamp(
        max=logits_bv.shape[1] - 1
    )
