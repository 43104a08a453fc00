"""What a run does about steps that go wrong: losses and gradients that are no numbers, and losses
that jump."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mellum2_megatron.common.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Stability:
    """What happens to the update of a step whose loss or gradient is not as it should be.

    A skipped update leaves weights and optimizer state as they were, on every rank. The step counts
    all the same: its samples are not seen again, and the learning rate's schedule goes on over
    them.

    Attributes:
        not_finite: when a loss or a gradient is NaN or infinite on any rank: ``stop`` ends the run
            in that step, ``skip`` skips the update. The first update of all is never skipped: there
            is no optimizer state yet.
        spike: when the loss of a step is more than ``spike_factor`` times the median of the
            ``spike_window`` steps before it: ``record`` writes it down and goes on, ``skip`` skips
            the update, ``stop`` ends the run, ``ignore`` does not look.
        spike_factor: see there; above 1.
        spike_window: see there. Nothing is a spike until so many steps are known; they come back
            with a checkpoint, and are forgotten where a run continues another one, whose data may
            be others.
        max_skips: so many updates may be skipped one after another; the next one ends the run.

    Raises:
        InputError: a value outside its range.
    """

    not_finite: Literal["stop", "skip"] = "stop"
    spike: Literal["record", "skip", "stop", "ignore"] = "record"
    spike_factor: float = 1.3
    spike_window: int = 100
    max_skips: int = 5

    def __post_init__(self) -> None:
        _require(
            "stability.spike_factor",
            self.spike_factor,
            self.spike_factor > 1,
            "must be above 1",
            "use 1.3",
        )
        _require(
            "stability.spike_window",
            self.spike_window,
            self.spike_window > 1,
            "must be 2 or more",
            "use 100",
        )
        _require(
            "stability.max_skips", self.max_skips, self.max_skips > 0, "must be positive", "use 5"
        )

    @property
    def is_watching(self) -> bool:
        """Whether steps have to be looked at; Megatron by itself ends a run whose numbers are not
        finite."""
        return self.not_finite == "skip" or self.spike != "ignore"


def _require(key: str, value: float, holds: bool, rule: str, fix: str) -> None:
    if not holds:
        raise InputError(f"{key}={value}", rule=rule, fix=fix)
