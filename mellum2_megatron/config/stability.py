"""Settings for steps that go wrong: non-finite losses or gradients, and loss spikes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mellum2_megatron.common.field_checks import check_fields, require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class Stability:
    """Reaction to a step with a non-finite value or a loss spike.

    A skipped update leaves weights and optimizer state unchanged on every rank. The step still
    counts: its samples are not used again, and the learning-rate schedule advances.

    Attributes:
        not_finite: reaction to a NaN or infinite loss or gradient on any rank. ``stop`` (default)
            ends the run in that step. ``skip`` skips the update, except the first one of a run,
            which creates the optimizer state.
        spike: reaction to a loss above ``spike_factor`` times the median of the last
            ``spike_window`` steps. ``record`` (default) logs an event, ``skip`` skips the update,
            ``stop`` ends the run, ``ignore`` does nothing.
        spike_factor: threshold of a spike as a multiple of the median, above 1, default 1.3.
        spike_window: number of steps that the median is taken over, 2 or more, default 100. Until
            there are as many, no step is a spike. A resumed run keeps its window. A run that
            continues another one starts an empty one, because its data may differ.
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
        check_fields("stability", self)
        require(
            1 < self.spike_factor <= 1e6,
            f"stability.spike_factor={self.spike_factor}",
            rule="must be above 1, 1e6 at most",
            fix="use 1.3",
        )
        require(
            1 < self.spike_window <= 1_000_000,
            f"stability.spike_window={self.spike_window}",
            rule="must be 2 or more, 1,000,000 at most",
            fix="use 100",
        )
        require_positive("stability.max_skips", self.max_skips, fix="use 5")

    @property
    def is_watching(self) -> bool:
        """True if this project must check each step.

        Megatron alone stops at a non-finite value, which is enough for ``not_finite=stop`` with
        ``spike=ignore``.
        """
        return self.not_finite == "skip" or self.spike != "ignore"
