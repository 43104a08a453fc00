"""A Hugging Face folder as the model that `mellum2_megatron.evaluation` asks, by transformers."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.folder import HfFolder
from conversion.huggingface.scoring import load_hf
from conversion.huggingface.writer import check_tokenizer
from mellum2_megatron.evaluation import Continuation
from mellum2_megatron.evaluation.model import TokenizedModel, one_by_one

_BLOCK = 1024
"""Positions whose logits exist at once: all of a long text would take tens of GB."""


class TransformersModel(TokenizedModel):
    """`mellum2_megatron.evaluation.EvaluatedModel` of a Hugging Face folder.

    Args:
        hf_path: folder with weights and tokenizer.
        dtype: dtype of weights and arithmetic, default float32.

    Raises:
        InputError: the folder is not a complete Mellum 2 model with its tokenizer.
    """

    def __init__(self, hf_path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        with HfFolder.open(hf_path) as folder:
            architecture = folder.architecture
        check_tokenizer(Path(hf_path), architecture)
        super().__init__(architecture, Path(hf_path))
        self._model, _mtp = load_hf(hf_path, dtype)

    @torch.no_grad()
    def log_probabilities(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return `[b, s - 1]`, see `EvaluatedModel`; one row is computed at a time."""
        return torch.stack([self._of_row(row.long()) for row in tokens])

    @torch.no_grad()
    def score_continuations(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Continuation]:
        """Return how the model takes each continuation; the prompt is computed once."""
        output = self._model.model(input_ids=torch.tensor([prompt]), use_cache=True)
        last = output.last_hidden_state[:, -1:]
        results = []
        for continuation in continuations:
            hidden = last
            if len(continuation) > 1:
                rest = self._model.model(
                    input_ids=torch.tensor([continuation[:-1]]),
                    # Each continuation grows its own: sliding layers cannot go back.
                    past_key_values=copy.deepcopy(output.past_key_values),
                    use_cache=True,
                )
                hidden = torch.cat([last, rest.last_hidden_state], dim=1)
            wanted = torch.tensor(continuation)
            logits = self._model.lm_head(hidden)[0].float()
            results.append(
                Continuation(
                    log_probability=float(_gather(logits, wanted).sum()),
                    is_greedy=bool((logits.argmax(-1) == wanted).all()),
                )
            )
        return results

    @torch.no_grad()
    def continue_greedily(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[int]:
        """Return the most likely next tokens, see `EvaluatedModel`."""
        ids: list[int] = []
        cache: Any = None
        following = torch.tensor([prompt])
        while len(ids) < max_new_tokens:
            output = self._model.model(input_ids=following, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids.append(int(self._model.lm_head(output.last_hidden_state[0, -1]).argmax()))
            if ids[-1] in stop:
                break
            following = torch.tensor([ids[-1:]])
        return ids

    def continue_all(
        self, prompts: Sequence[Sequence[int]], *, most: Sequence[int], stop: Collection[int] = ()
    ) -> list[list[int]]:
        """Return the most likely next tokens after each prompt, one prompt after the other."""
        return one_by_one(self, prompts, most, stop)

    def _of_row(self, row: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities `[s - 1]` of token ids `[s]`."""
        hidden = self._model.model(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]
        parts = zip(torch.split(hidden, _BLOCK), torch.split(row[1:], _BLOCK), strict=True)
        return torch.cat(
            [_gather(self._model.lm_head(part).float(), wanted) for part, wanted in parts]
        )


def _gather(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the log-probability `[n]` of tokens ``wanted`` `[n]` under logits `[n, v]`."""
    return logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
