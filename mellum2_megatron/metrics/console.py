"""Console output of a training: rows above a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_HEADER_EVERY = 25
"""Number of rows between two lines of column titles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    """A column of the console.

    Attributes:
        rank: importance; a narrow terminal shows the columns of the lowest ranks.
        title: title above the column, and label in a plain line.
        key: name of the value in a step's metrics.
        form: function from the value to its text.
        width: width in a terminal, in characters.
    """

    rank: int
    title: str
    key: str
    form: Callable[[float], str]
    width: int


def short_number(value: float) -> str:
    """Return a number in three significant digits, thousands as K, M, G, T.

    >>> short_number(950), short_number(12345), short_number(7_600_000), short_number(0.1234)
    ('950', '12.3K', '7.6M', '0.123')
    """
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds.

    >>> duration(59.4), duration(3725), duration(90061)
    ('0:59', '1:02:05', '25:01:01')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_COLUMNS = (
    _Column(rank=0, title="step", key="step", form=lambda value: f"{value:.0f}", width=8),
    _Column(rank=8, title="samples", key="samples", form=short_number, width=8),
    _Column(rank=7, title="tokens", key="tokens", form=short_number, width=7),
    _Column(rank=1, title="lm loss", key="lm_loss", form=lambda value: f"{value:.4f}", width=8),
    _Column(rank=6, title="mtp loss", key="mtp_loss", form=lambda value: f"{value:.4f}", width=8),
    _Column(rank=10, title="aux", key="aux_loss", form=lambda value: f"{value:.3g}", width=8),
    _Column(rank=11, title="z", key="z_loss", form=lambda value: f"{value:.3g}", width=8),
    _Column(rank=4, title="grad norm", key="grad_norm", form=lambda value: f"{value:.3f}", width=9),
    _Column(rank=3, title="lr", key="learning_rate", form=lambda value: f"{value:.2e}", width=8),
    _Column(
        rank=9, title="busiest expert", key="busiest", form=lambda value: f"{value:.2f}x", width=14
    ),
    _Column(rank=5, title="tokens/s", key="tokens_per_second", form=short_number, width=8),
    _Column(
        rank=12, title="model TFLOP/s", key="model_tflops_per_second", form=short_number, width=13
    ),
    _Column(rank=2, title="left", key="left", form=duration, width=8),
)


def fitting_columns(width: int) -> tuple[_Column, ...]:
    """Return the most important columns whose row is no wider than a terminal, in their order.

    >>> [column.title for column in fitting_columns(40)]
    ['step', 'lm loss', 'lr', 'left']
    """
    chosen: list[_Column] = []
    for column in sorted(_COLUMNS, key=lambda column: column.rank):
        if sum(other.width + 2 for other in (*chosen, column)) - 2 > width:
            break
        chosen.append(column)
    return tuple(column for column in _COLUMNS if column in chosen)


class TrainingConsole:
    """Prints one row for each logged step.

    A terminal shows the columns that fit its width; ``metrics.jsonl`` always has all of them.

    Args:
        title: run and processes, for the first line.
        total_steps: step at which the run ends.
        total_samples: sample count at which the run ends. The time left is estimated from samples,
            because the batch may grow.
        resume_step: step of the loaded checkpoint; 0 for a new run.
        file: output stream; None: standard output.
    """

    def __init__(
        self,
        *,
        title: str,
        total_steps: int,
        total_samples: int,
        resume_step: int = 0,
        file: TextIO | None = None,
    ) -> None:
        from rich.console import Console

        self._file = file or sys.stdout
        self._console = Console(file=self._file, highlight=False, soft_wrap=True)
        self._total_steps, self._total_samples = total_steps, total_samples
        self._first: tuple[float, float] | None = None
        self._rows = 0
        self._columns: tuple[_Column, ...] = ()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = _bar(self._console, total_steps, resume_step)
        start = f"resuming after step {resume_step}" if resume_step else "starting"
        self.print_line(f"{title}: {start}, {total_steps} steps in all")

    def print_line(self, text: str) -> None:
        """Print ``text`` as one line, above the progress bar if there is one."""
        if self._bar is not None:
            self._console.print(text, markup=False)
        else:
            self._file.write(text + "\n")
            self._file.flush()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Print a training step.

        A column without a value is blank in a row and left out of a plain line.

        Args:
            step: the step, from 1.
            values: metrics by name, as in ``metrics.jsonl``. Those without a column are not shown.
        """
        shown = {**values, "step": float(step)}
        # One number for all layers: load of the busiest expert in the worst layer; 1.0 is even.
        loads = [value for name, value in values.items() if name.endswith("/max_over_mean")]
        if loads:
            shown["busiest"] = max(loads)
        left = self._seconds_left(values["samples"]) if "samples" in values else None
        if left is not None:
            shown["left"] = left
        columns = _COLUMNS if self._bar is None else fitting_columns(self._console.width)
        cells = [
            (column, column.form(shown[column.key]) if column.key in shown else "")
            for column in columns
        ]
        if self._bar is None:
            parts = [f"{column.title} {cell}" for column, cell in cells if cell]
            # A terminal's progress bar shows the total; a plain line must give it.
            parts[0] = f"step {step}/{self._total_steps}"
            self.print_line(" | ".join(parts))
            return
        # A header again after the window was resized.
        if self._rows % _HEADER_EVERY == 0 or columns != self._columns:
            self._console.print(
                "  ".join(column.title.rjust(column.width) for column in columns), style="bold"
            )
        self._rows, self._columns = self._rows + 1, columns
        self._console.print("  ".join(cell.rjust(column.width) for column, cell in cells))
        self._bar.update(self._bar.task_ids[0], completed=step)

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Print the losses of a validation after ``step`` steps."""
        parts = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items()]
        self.print_line(f"step {step}/{self._total_steps} | validation | " + " | ".join(parts))

    def tasks(self, step: int, values: Mapping[str, float]) -> None:
        """Print the scores of tasks after ``step`` steps."""
        parts = [f"{name} {value:.3f}" for name, value in values.items()]
        self.print_line(f"step {step}/{self._total_steps} | tasks | " + " | ".join(parts))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Print a text that the model generated after ``step`` steps, its lines indented."""
        self.print_line(f"step {step}/{self._total_steps} | sample | {prompt!r} continues as")
        for line in text.splitlines():
            self.print_line(f"    {line}")

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.stop()

    def _seconds_left(self, samples: float) -> float | None:
        """Return the seconds left at the average speed since the first logged step.

        None on that step.
        """
        now = time.monotonic()
        if self._first is None or samples <= self._first[1]:
            # Counted from the first row on: steps before it include start-up and compilation.
            self._first = (now, samples)
            return None
        began, first = self._first
        return (self._total_samples - samples) * (now - began) / (samples - first)


def _bar(console: Console, total: int, completed: int) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    bar.add_task("training", total=total, completed=completed)
    bar.start()
    return bar
