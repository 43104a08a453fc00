"""The ranks of a command that trains, forked from the server of `tests.distributed`.

A rank started as its own program imports torch and Megatron first, which is most of its time in a
small test. For tests of something else than the start.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

from tests.distributed import run_distributed

_MODULE = "mellum2_megatron.training"


def fork_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the ranks of commands that run in this process; a failed one fails the test."""

    def run_ranks(command: Sequence[str], *, nproc: int, **_: Any) -> int:
        words = [*command[command.index(_MODULE) + 1 :]]
        words.remove("--to-launcher")  # a failure is in the ranks' output then
        run_distributed(
            f"{__name__}:rank",
            nproc,
            words,
            os.getcwd(),
            timeout=300,
            environment=dict(os.environ),
        )
        return 0

    monkeypatch.setattr("launchers.local.run_ranks", run_ranks)


def rank(words: list[str], folder: str) -> None:
    """Run the program of a rank with these arguments, in a folder."""
    from mellum2_megatron.training import rank_main

    os.chdir(folder)
    assert rank_main.main(words) == 0
