"""Losses of the last steps, and detection of spikes."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence


class LossHistory:
    """Losses of the last steps; a new loss well above their median is a spike.

    >>> history = LossHistory(window=3, factor=1.5)
    >>> [history.add(loss) for loss in (2.0, 9.0, 2.0, 2.9, 4.5, 2.0)]
    [None, None, None, None, 2.9, None]

    Args:
        window: number of losses to keep; no loss counts as a spike before that many are kept.
        factor: a loss above ``factor`` times the median is a spike.
        losses: losses of earlier steps, oldest first; default none.
    """

    def __init__(self, *, window: int, factor: float, losses: Sequence[float] = ()) -> None:
        self.window, self.factor = window, factor
        self._losses = deque(losses, maxlen=window)

    def add(self, loss: float) -> float | None:
        """Keep a step's loss. Return the median before it if it is a spike, else None."""
        median = statistics.median(self._losses) if len(self._losses) == self.window else None
        # Spikes too: one hardly moves the median, and a loss that stays up becomes the normal one.
        self._losses.append(loss)
        return median if median is not None and loss > self.factor * median else None

    @property
    def losses(self) -> list[float]:
        """Losses of the last steps, oldest first, at most ``window`` of them."""
        return list(self._losses)
