"""What a measure may ask of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer, special_ids

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """How a model takes a given continuation of a prompt.

    Attributes:
        log_probability: sum over the tokens of the continuation, in nats.
        is_greedy: true if each of them is the most likely one at its place.
    """

    log_probability: float
    is_greedy: bool


class EvaluatedModel(Protocol):
    """A model with its tokenizer.

    Attributes:
        architecture: the model's description; it gives the longest context.
    """

    @property
    def architecture(self) -> Mellum2Architecture:
        """The model's description."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids of the special tokens by role, see `data.tokens.tokenizer.special_ids`."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens around it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""

    def log_probabilities(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of every token but the first, given those before it.

        Args:
            tokens: token ids `[b, s]`, s >= 2.

        Returns:
            Nats, `[b, s - 1]`, float32: place t belongs to token t + 1.
        """

    def score_continuations(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Continuation]:
        """Return how the model takes each continuation of one prompt, none of them empty."""

    def continue_greedily(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[int]:
        """Return the most likely next tokens, one after the other.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: most tokens to return.
            stop: ids that end the text; the one that did is returned too.
        """

    def continue_all(
        self, prompts: Sequence[Sequence[int]], *, most: Sequence[int], stop: Collection[int] = ()
    ) -> list[list[int]]:
        """Return what `continue_greedily` returns for each prompt.

        Args:
            prompts: token ids of each prompt, at least one.
            most: most tokens to return, for each prompt.
            stop: ids that end a text.
        """


class TokenizedModel:
    """The part of an `EvaluatedModel` that its tokenizer gives.

    Args:
        architecture: the model's description.
        folder: folder with the tokenizer.
    """

    def __init__(self, architecture: Mellum2Architecture, folder: Path) -> None:
        self._architecture = architecture
        self._tokenizer = load_tokenizer(folder)
        self._special_ids = special_ids(folder, need_eos=False)

    @property
    def architecture(self) -> Mellum2Architecture:
        """The model's description."""
        return self._architecture

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids of the special tokens by role."""
        return self._special_ids

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; a special token's spelling is ordinary text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def one_by_one(
    model: EvaluatedModel,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    stop: Collection[int],
) -> list[list[int]]:
    """Return `EvaluatedModel.continue_all` of a model that takes one prompt at a time."""
    return [
        model.continue_greedily(prompt, max_new_tokens=count, stop=stop)
        for prompt, count in zip(prompts, most, strict=True)
    ]


def cut_at(ids: Sequence[int], stop: Collection[int]) -> list[int]:
    """Return token ids up to the first one of ``stop``, which is kept; all if there is none.

    >>> cut_at([5, 6, 1, 7], [1, 2])
    [5, 6, 1]
    """
    end = next((place for place, token in enumerate(ids) if token in stop), len(ids))
    return list(ids[: end + 1])
