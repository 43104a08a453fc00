"""Settings for steps that go wrong: non-finite losses or gradients, and loss spikes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mellum2_megatron.common.field_checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class Stability:
    """Reaction to a step with a non-finite value or a loss spike.

    A skipped update leaves weights and optimizer state unchanged on every rank. The step still
    counts: its samples are not seen again, and the learning-rate schedule advances.

    Attributes:
        not_finite: reaction to a NaN or infinite loss or gradient on any rank. ``stop`` (default)
            ends the run in that step. ``skip`` skips the update, except the first of a run, which
            creates the optimizer state.
        spike: reaction to a loss above ``spike_factor`` times the median of the last
            ``spike_window`` steps. ``record`` (default) logs an event, ``skip`` skips the update,
            ``stop`` ends the run, ``ignore`` does nothing.
        spike_factor: threshold of a spike, above 1, default 1.3.
        spike_window: steps of the median, 2 or more, default 100. Fewer steps make no spike. A
            resumed run keeps its window; a run that continues another one starts an empty window,
            because its data may differ.
        max_skips: updates that may be skipped in a row, default 5; the next one ends the run.

    Raises:
        InputError: a value outside its range.
    """

    not_finite: Literal["stop", "skip"] = "stop"
    spike: Literal["record", "skip", "stop", "ignore"] = "record"
    spike_factor: float = 1.3
    spike_window: int = 100
    max_skips: int = 5

    def __post_init__(self) -> None:
        require(
            self.spike_factor > 1,
            f"stability.spike_factor={self.spike_factor}",
            rule="must be above 1",
            fix="use 1.3",
        )
        require(
            self.spike_window > 1,
            f"stability.spike_window={self.spike_window}",
            rule="must be 2 or more",
            fix="use 100",
        )
        require(
            self.max_skips > 0,
            f"stability.max_skips={self.max_skips}",
            rule="must be positive",
            fix="use 5",
        )

    @property
    def is_watching(self) -> bool:
        """True if steps must be checked by us; Megatron itself stops at a non-finite value."""
        return self.not_finite == "skip" or self.spike != "ignore"
