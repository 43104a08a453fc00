"""Answers of a model, what a verifier says of them, and the form of a verifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mellum2_megatron.common.errors import WorkError, shown
from mellum2_megatron.common.field_checks import is_number

THINK, END_THINK = "<think>", "</think>"


class ArgumentsError(ValueError):
    """Arguments of a task that its verifier cannot use; the message is the reason, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer of a model.

    Attributes:
        text: all that the model wrote, without the token that ends a turn.
        thinking: true if thoughts come first, up to ``</think>``. Then what stands before it is
            never looked at, and an answer that does not come to its end is empty.
        ended: true (default) if the model ended its turn itself, false if it was cut off.
    """

    text: str
    thinking: bool = False
    ended: bool = True

    @property
    def content(self) -> str:
        """The answer without the thoughts."""
        if not self.thinking:
            return self.text
        return self.text.partition(END_THINK)[2].lstrip("\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a verifier says of an answer.

    Attributes:
        reward: from 0 to 1.
        reason: why it is not 1, in a few words, for people.

    Raises:
        WorkError: a reward that is no number from 0 to 1: the verifier is wrong.
    """

    reward: float
    reason: str = ""

    def __post_init__(self) -> None:
        if not (is_number(self.reward) and 0 <= self.reward <= 1):
            raise WorkError(
                f"a verifier gave the reward {shown(self.reward)}",
                fix="return a number from 0 to 1",
            )


RIGHT = Verdict(reward=1.0)


class Verifier(Protocol):
    """A kind of check. One object serves many threads."""

    def check(self, arguments: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> list[str]:
        """Check the arguments of a task, and return warnings about them.

        Args:
            arguments: its arguments.
            tools: its tools.

        Raises:
            ArgumentsError: they cannot work.
        """

    def score(
        self,
        answer: Answer,
        arguments: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]],
    ) -> Verdict:
        """Return the verdict on one answer; the arguments are checked."""


def wrong(reason: str) -> Verdict:
    """Return the verdict of a wrong answer."""
    return Verdict(reward=0.0, reason=reason)


def take(
    arguments: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], *, required: Sequence[str]
) -> None:
    """Refuse arguments that are unknown, of another type, or missing.

    Args:
        arguments: the arguments.
        kinds: name of each argument that is known -> its types in JSON.
        required: names that must be there.

    Raises:
        ArgumentsError: the first fault.
    """
    for name, value in arguments.items():
        if name not in kinds:
            raise ArgumentsError(f"unknown argument {shown(name)}; known: {', '.join(kinds)}")
        # In Python true is an int, in JSON it is no number.
        if not isinstance(value, kinds[name]) or (
            isinstance(value, bool) and bool not in kinds[name]
        ):
            raise ArgumentsError(f"{name} is {shown(value)}, of another type")
    for name in required:
        if name not in arguments:
            raise ArgumentsError(f"{name} is missing")
