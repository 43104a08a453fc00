"""One tensor of the released layout, and the shapes of a gated MLP."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

Shape = tuple[int, ...]
Component = Literal[
    "embedding",
    "attention",
    "router",
    "experts",
    "shared expert",
    "dense MLP",
    "norms",
    "mtp projection",
    "output head",
]


class Parameter(NamedTuple):
    """One tensor of the released layout.

    Attributes:
        name: key in the safetensors files, e.g. ``model.layers.3.mlp.experts.7.up_proj.weight``.
        shape: as stored, ``[out, in]`` for a matrix.
        component: row of `mellum2 info` that counts it.
        layer: index inside its stack (trunk, or MTP with ``mtp``); None (default) for embedding,
            final norm and head.
        expert: index of the routed expert; None (default) outside experts.
        mtp: true for a tensor of the multi-token-prediction head, default false.
    """

    name: str
    shape: Shape
    component: Component
    layer: int | None = None
    expert: int | None = None
    mtp: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def gated_mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of the three matrices of a gated MLP.

    Args:
        prefix: start of the names, with the dot.
        hidden: width of the residual stream.
        width: inner width of the MLP.
    """
    yield f"{prefix}gate_proj.weight", (width, hidden)
    yield f"{prefix}up_proj.weight", (width, hidden)
    yield f"{prefix}down_proj.weight", (hidden, width)
