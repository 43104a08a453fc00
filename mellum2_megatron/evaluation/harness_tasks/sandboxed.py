"""Functions that the tasks of this folder name; the harness loads this file by its path."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from mellum2_megatron.rlvr.rewards.sandbox import find_sandbox

_FENCE = "```"


def passes(program: str) -> bool:
    """Return true if a program, its tests at the end, runs to its last line in the sandbox.

    The last line prints a word that the program does not know, so that ending early proves nothing.
    """
    word = secrets.token_hex(16)
    outcome = find_sandbox().run(f"{program}\nprint({word!r})\n")
    lines = outcome.output.decode("utf-8", "replace").splitlines()
    return outcome.exit_code == 0 and outcome.stopped is None and lines[-1:] == [word]


def pass_at_1(references: Sequence[str], predictions: Sequence[str | Sequence[str]]) -> float:
    """Return the share of programs that pass their tests.

    Args:
        references: tests of each question.
        predictions: the program of each question, or several.
    """
    results = [
        passes(f"{program}\n{tests}")
        for tests, given in zip(references, predictions, strict=True)
        for program in ([given] if isinstance(given, str) else given)
    ]
    return sum(results) / len(results)


def with_prompt(
    answers: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Return the programs: a function's head and the answer."""
    return [
        [doc["prompt"] + answer for answer in each] for each, doc in zip(answers, docs, strict=True)
    ]


def with_prompt_to_fence(
    answers: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Return the programs: a function's head and the answer up to the end of its block of code."""
    return with_prompt([[one.partition(_FENCE)[0] for one in each] for each in answers], docs)


def mbpp_examples(docs: Any) -> Any:
    """Return MBPP's questions 2, 3 and 4, which prompts show as examples (Austin et al. 2021)."""
    examples = docs.filter(lambda doc: doc["task_id"] in (2, 3, 4))
    return examples.map(lambda _doc: {"is_example": True})
