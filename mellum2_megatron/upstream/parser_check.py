"""Whether Megatron's parser takes the words of `execution.extra_arguments`, before a rank starts.

Importing Megatron takes ten seconds, and in a rank it has to follow our patches. So a process of
its own asks, and only where there are such words.
"""

from __future__ import annotations

import functools
import subprocess
import sys

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Run

_REFUSED = 2
"""Exit code of argparse for a word that it does not take."""


def require_parsed(run: Run) -> None:
    """Refuse words of `execution.extra_arguments` that Megatron's parser does not take.

    Raises:
        InputError: an unknown option, or a value of another type; the message is the parser's.
        WorkError: Megatron could not be asked.
    """
    said = _refusal(run.execution.extra_arguments)
    if said is not None:
        raise refused(run, said)


def refused(run: Run, said: str) -> InputError:
    """Return the error for words that Megatron's parser has refused, from what it has printed."""
    return InputError(
        f"execution.extra_arguments={' '.join(run.execution.extra_arguments)}",
        rule=f"Megatron's command line: {said.strip().rpartition('error: ')[2]}",
        fix="correct them, or leave them out",
    )


@functools.cache
def _refusal(words: tuple[str, ...]) -> str | None:
    """Return what Megatron's parser prints when it refuses words; None if it takes them."""
    if not words:
        return None
    done = subprocess.run(
        [sys.executable, "-m", __name__, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, _REFUSED):
        raise WorkError(
            f"Megatron's parser cannot be asked: {done.stderr.strip().rpartition(chr(10))[2]}",
            fix="run `mellum2 doctor`",
        )
    return done.stderr if done.returncode else None


def _main() -> None:
    from megatron.training.arguments import parse_args

    parse_args()  # of this process's words


if __name__ == "__main__":
    _main()
