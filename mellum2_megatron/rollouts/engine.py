"""What an engine of rollouts is: prompts in, sampled tokens with their log-probabilities out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mellum2_megatron.common.errors import WorkError

if TYPE_CHECKING:
    from conversion.live_weights import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt to answer.

    Attributes:
        place: its task's place, for messages.
        tokens: token ids.
        seed: seed of its answers' random numbers; the answers depend on nothing else but the
            weights, neither on other prompts nor on the number of ranks.
    """

    place: str
    tokens: tuple[int, ...]
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """An answer as an engine wrote it.

    Attributes:
        tokens: token ids, the one that ends the turn included.
        log_probabilities: of each token under the engine's weights, in nats.
        ended: true if it ended itself, false if it was cut off.
    """

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    ended: bool


class Engine(Protocol):
    """A writer of answers. One thread uses it at a time."""

    def load(self, weights: Weights) -> None:
        """Write with these weights from now on.

        Raises:
            WorkError: the engine is gone.
        """

    def write(
        self, prompts: Sequence[Prompt], *, answers: int, max_tokens: int
    ) -> list[list[Sampled]]:
        """Return sampled answers to each prompt, from all tokens at temperature 1.

        Args:
            prompts: the prompts.
            answers: answers to each.
            max_tokens: tokens of the longest answer.

        Raises:
            WorkError: the engine is gone, or an answer lacks a log-probability.
        """

    def close(self) -> None:
        """End what the engine has started."""


def check_sampled(place: str, one: Sampled) -> None:
    """Refuse an answer whose tokens do not all have a finite log-probability.

    Raises:
        WorkError: the first that is missing, NaN, infinite or above 0.
    """
    if not one.tokens:
        raise WorkError(f"{place}: the engine wrote an empty answer", fix="look at its log")
    if len(one.tokens) != len(one.log_probabilities):
        raise WorkError(
            f"{place}: {len(one.tokens)} tokens and {len(one.log_probabilities)} log-probabilities",
            fix="have the engine return the log-probability of every token",
        )
    for position, value in enumerate(one.log_probabilities):
        if not math.isfinite(value) or value > 1e-3:
            raise WorkError(
                f"{place}: log-probability {value} of token {position} of an answer",
                fix="it must be a number up to 0; look at the engine's weights and number format",
            )
