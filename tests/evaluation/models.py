"""Models whose figures are known: one letter a token, and answers by a rule."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

import torch

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.evaluation import Continuation
from mellum2_megatron.evaluation.model import one_by_one


class ByteModel:
    """A model of bytes: log-probability -t / 1000 at position t; it knows no continuation."""

    architecture = Mellum2Architecture.preset("mellum2-tiny")
    special_ids: Mapping[str, int] = {}

    def encode(self, text: str) -> list[int]:
        """Return the text's bytes."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of bytes."""
        return bytes(ids).decode()

    def log_probabilities(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return -t / 1000 for the token at position t."""
        positions = torch.arange(1, tokens.shape[1], dtype=torch.float32)
        return (-positions / 1000).expand(tokens.shape[0], -1)

    def score_continuations(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Continuation]:
        """Return what is known about each continuation: here the same of all."""
        return [
            Continuation(log_probability=len(one) * math.log(0.1), is_greedy=False)
            for one in continuations
        ]

    def continue_greedily(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[int]:
        """Return a line end, again and again."""
        return [10] * max_new_tokens

    def continue_all(
        self, prompts: Sequence[Sequence[int]], *, most: Sequence[int], stop: Collection[int] = ()
    ) -> list[list[int]]:
        """Return the texts one by one."""
        return one_by_one(self, prompts, most, stop)


class Reader(ByteModel):
    """Reads the last ``seen`` tokens of a prompt, and answers with the number it finds there."""

    def __init__(self, seen: int) -> None:
        self.seen = seen
        self.prompts: list[str] = []

    def score_continuations(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Continuation]:
        """Return certainty for the number behind the question's own name."""
        text = self.decode(prompt)
        self.prompts.append(text)
        name = re.fullmatch(r"assert (\w+) ==", text.splitlines()[-1])
        assert name is not None
        found = re.search(rf"^{name[1]} = (\d+)$", text[-self.seen :], re.MULTILINE)
        answer = f" {found[1]}" if found else ""
        return [
            Continuation(
                log_probability=0.0 if self.decode(one) == answer else -10.0,
                is_greedy=self.decode(one) == answer,
            )
            for one in continuations
        ]
