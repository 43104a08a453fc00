"""The machines that recipes are written for, each with its parallel layout and the source of its
size."""

from __future__ import annotations

from dataclasses import dataclass

from mellum2_megatron.config import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What a recipe runs on.

    Attributes:
        suffix: end of the recipe's name.
        text: the same in its description.
        layout, long_layout: of the phases and of the long-context stage.
        source, long_source: where the number of ranks comes from.
    """

    suffix: str
    text: str
    layout: Layout
    long_layout: Layout
    source: str
    long_source: str


def _h200(gpus: int, source: str, long_source: str) -> Hardware:
    """EP 8 within a node (report §3); long context with CP 8 beside it, as in the report's SFT."""
    return Hardware(
        suffix=f"{gpus}gpu_h200_fp8",
        text=f"{gpus} GPUs",
        layout=Layout(ep=8, dp=gpus),
        long_layout=Layout(ep=8, cp=8, dp=gpus // 8),
        source=source,
        long_source=long_source,
    )


H200_256 = _h200(
    256,
    "report §3: 32 nodes of 8 H200",
    "ours: the nodes that the report's pre-training began with (§3)",
)


H200_128 = _h200(
    128,
    "report §3: 16 nodes of 8 H200, as later in the training",
    "report §5.1: 16 nodes of 8 H200",
)


H200_8 = _h200(8, "ours: the same training on one node", "ours: the same training on one node")


H200_1 = Hardware(
    suffix="1gpu_h200_fp8",
    text="one GPU",
    layout=Layout(dp=1),
    long_layout=Layout(dp=1),
    source="ours: one GPU",
    long_source="ours: one GPU",
)
