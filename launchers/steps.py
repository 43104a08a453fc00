"""Steps of a quickstart: each is a command of mellum2, printed as such and run as a process."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

from mellum2_megatron.common.console import console
from mellum2_megatron.common.errors import InputError, WorkError

_SECONDS_TO_END = 40.0
"""Seconds for an interrupted step to end by itself; torch's agent kills ranks after 30."""


@dataclass
class Steps:
    """Runs commands one after the other, and knows how long each took.

    Attributes:
        seconds: duration of each step that ran, by name.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, purpose: str, *words: str) -> None:
        """Run one command of mellum2 in a process of its own.

        Raises:
            InputError, WorkError: the command failed with exit code 2, or another one.
        """
        self.announce(name, purpose, *words)
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "mellum2_megatron", *words])
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal has interrupted the command too, which first ends its own processes.
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
            raise
        self.seconds[name] = time.monotonic() - start
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        # The command has printed its own message.
        if code == InputError.exit_code:
            raise InputError(
                f"step {name}", rule="was refused (see above)", fix="follow its message"
            )
        if code:
            raise WorkError(
                f"step {name} failed with exit code {code} (see above)", fix="follow its message"
            )

    def announce(self, name: str, purpose: str, *words: str) -> None:
        """Print what comes next, with the command that does the same."""
        console.rule(f"[bold]{name}[/]: {purpose}", align="left")
        if words:
            console.print(
                f"$ mellum2 {shlex.join(words)}", style="dim", soft_wrap=True, highlight=False
            )

    def rounded(self) -> dict[str, float]:
        """Return the seconds of all steps to a tenth."""
        return {name: round(seconds, 1) for name, seconds in self.seconds.items()}
