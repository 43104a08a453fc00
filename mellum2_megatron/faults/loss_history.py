"""The losses of the last steps, and whether a new one is a spike."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence


class LossHistory:
    """Losses of the last steps, and whether a new one stands out.

    >>> history = LossHistory(window=3, factor=1.5)
    >>> [history.add(loss) for loss in (2.0, 9.0, 2.0, 2.9, 3.1, 2.0)]
    [None, None, None, None, 2.9, None]

    Args:
        window: steps that are remembered.
        factor: a loss above ``factor`` times their median stands out.
        losses: of the steps so far, oldest first.
    """

    def __init__(self, *, window: int, factor: float, losses: Sequence[float] = ()) -> None:
        self.window, self.factor = window, factor
        self._losses = deque(losses, maxlen=window)

    def add(self, loss: float) -> float | None:
        """Remember a step's loss, and return the median that it stands out from; None if it does
        not.

        A spike is remembered too: the median hardly moves, and a loss that stays up becomes the
        normal one.
        """
        median = statistics.median(self._losses) if len(self._losses) == self.window else None
        self._losses.append(loss)
        return median if median is not None and loss > self.factor * median else None

    @property
    def losses(self) -> list[float]:
        """The losses that are remembered, oldest first."""
        return list(self._losses)
