"""Machines that recipes are written for: a parallel layout and the source of its size."""

from __future__ import annotations

from dataclasses import dataclass

from mellum2_megatron.config import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Machines that a stage runs on.

    Attributes:
        label: name in a recipe's description, such as ``256 GPUs``.
        layout: parallel layout that uses all of them.
        source: source of their number, recorded for ``layout.dp``.
    """

    label: str
    layout: Layout
    source: str


def h200_nodes(gpus: int, *, source: str, cp: int = 1) -> Hardware:
    """Return nodes of 8 H200; EP 8 keeps the experts of a layer inside one node (report §3).

    Args:
        gpus: number of GPUs in all nodes together.
        source: source of that number.
        cp: context-parallel ways, default 1; the rest is data parallel.
    """
    return Hardware(label=f"{gpus} GPUs", layout=Layout(ep=8, cp=cp, dp=gpus // cp), source=source)


ONE_GPU = Hardware(label="one GPU", layout=Layout(dp=1), source="ours: one GPU")
