"""The processes that score one Megatron checkpoint together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import Backend, Device, Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The processes that score a checkpoint together.

    Attributes:
        layout: degrees of the parallelisms, default one rank. Ranks beyond them score other
            sequences.
        nproc: number of processes, default the fewest that the layout needs.
        device: "cpu" or "cuda", one GPU a process; None (default): a GPU if there is one.
        backend: "te" or "torch"; None (default): "te" on a GPU, if Transformer Engine can be
            imported and supports the case.
        dtype: dtype of weights and arithmetic, default float32.
    """

    layout: Layout = field(default_factory=Layout)
    nproc: int | None = None
    device: Device | None = None
    backend: Backend | None = None
    dtype: str = "float32"

    @property
    def count(self) -> int:
        """Number of processes."""
        return self.nproc or self.layout.smallest_world_size

    def resolved_device(self) -> Device:
        """Return the device, with the default decided."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ranks:
        """Build it from the values of `to_dict`."""
        return cls(**values | {"layout": Layout(**values["layout"])})

    def validate(self, architecture: Mellum2Architecture, length: int) -> None:
        """Check that the layout fits the model and the number of processes.

        Raises:
            InputError: it does not; `Layout.validate`.
        """
        self.layout.validate(
            architecture, world_size=self.count, sequence_length=self.padded(length)
        )

    def padded(self, length: int) -> int:
        """Return the length to which a sequence of ``length`` tokens is padded."""
        # Context parallelism cuts a sequence into 2 * cp chunks, sequence parallelism each rank's
        # part into tp. Tokens after the last one change no logit: attention is causal, and no
        # expert drops a token.
        return math.ceil(length / (unit := 2 * self.layout.cp * self.layout.tp)) * unit
