"""Machines that recipes are written for: a parallel layout and the source of its size."""

from __future__ import annotations

from dataclasses import dataclass

from mellum2_megatron.config import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """The machines of one stage.

    Attributes:
        label: the machines in a recipe's description, such as ``256 GPUs``.
        layout: parallel layout that fills them.
        source: source of their number, recorded for ``layout.dp``.
    """

    label: str
    layout: Layout
    source: str


def h200_nodes(gpus: int, *, source: str, cp: int = 1) -> Hardware:
    """Return nodes of 8 H200 with the experts of a layer inside one node (report §3: EP 8).

    Args:
        gpus: GPUs of all nodes together.
        source: source of their number.
        cp: context-parallel ways; the rest is data parallel.
    """
    return Hardware(label=f"{gpus} GPUs", layout=Layout(ep=8, cp=cp, dp=gpus // cp), source=source)


ONE_GPU = Hardware(label="one GPU", layout=Layout(dp=1), source="ours: one GPU")
