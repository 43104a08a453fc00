"""Machines that recipes are written for: a parallel layout, and how a step is computed on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from mellum2_megatron.config import Execution, Layout, Precision

OVERLAP_SOURCES = {
    "layout.overlap_expert_comm": "ours: as in the fastest published runs on H100",
    "layout.delay_wgrad": "ours: as in Megatron-Bridge's run of Moonlight-16B-A3B",
}

FAST_SOURCES = {
    "layout.dispatcher": "ours: HybridEP, as in the fastest published runs on H100",
    "execution.gc_interval": "ours: as in Megatron-Bridge's runs",
    "execution.pad_expert_tokens": "ours: once in the router instead of in each product",
}

H100_SOURCES = {
    "schedule.micro_batch_size": "ours: one sequence, for a card of 80 GB",
    "execution.recompute": "ours: for a card of 80 GB",
}

EVEN_SOURCES = {
    "optimizer.muon_dense_shards": (
        "ours: from 128 ranks on, by count; the update is the same (docs/optimizer.md)"
    ),
}

BF16 = "ours: BF16, because no published run on Hopper shows FP8 ahead at this expert size"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Machines that a stage runs on.

    Attributes:
        label: name in a recipe's description, such as ``256 H200``.
        layout: parallel layout that uses all of them.
        source: source of their number, recorded for ``layout.dp``.
        precision: number formats; None (default): the stage's.
        execution: memory traded for time, and kernels; default none.
        micro_batch_size: sequences of a micro-batch; None (default): the stage's.
        muon_dense_shards: division of the dense matrices' buffers, default Megatron's.
        sources: sources of what differs from the stage, by key; default none.
    """

    label: str
    layout: Layout
    source: str
    precision: Precision | None = None
    execution: Execution = field(default_factory=Execution)
    micro_batch_size: int | None = None
    muon_dense_shards: Literal["whole", "even"] = "whole"
    sources: Mapping[str, str] = field(default_factory=dict)


def cluster(numbers: Mapping[int, str], *, default: int, cp: int = 1) -> dict[str, Hardware]:
    """Return nodes of 8 GPUs by the ending of a recipe's name, such as ``_256gpu_h200_bf16_fast``.

    EP 8 keeps the experts of a layer inside one node (report §3). On H200 and H100 there is each
    precision, plain and fast; on H100 with less memory.

    Args:
        numbers: source of each number of GPUs.
        default: number of GPUs behind an empty ending, which is plain FP8 on H200.
        cp: context-parallel ways, default 1; the rest is data parallel.
    """
    found = {}
    for gpus, source in numbers.items():
        for compute in ("fp8", "bf16"):
            plain = _h200(gpus, source, compute, cp)
            found[f"_{gpus}gpu_h200_{compute}"] = plain
            found[f"_{gpus}gpu_h200_{compute}_fast"] = _fast(plain)
            found[f"_{gpus}gpu_h100_{compute}"] = _h100(plain)
            found[f"_{gpus}gpu_h100_{compute}_fast"] = _fast(_h100(plain, fast=True))
    return {"": found[f"_{default}gpu_h200_fp8"], **found}


def _h200(gpus: int, source: str, compute: Literal["fp8", "bf16"], cp: int) -> Hardware:
    plain = Hardware(
        label=f"{gpus} H200" + " BF16" * (compute == "bf16"),
        layout=Layout(ep=8, cp=cp, dp=gpus // cp),
        source=source,
        precision=Precision(compute=compute),
        sources={"precision.compute": BF16} if compute == "bf16" else {},
    )
    return with_even_shares(plain)


def with_even_shares(machines: Hardware) -> Hardware:
    """Return the same machines with even shares of dense matrices, from 128 GPUs on."""
    if (machines.layout.world_size or 1) < 128:
        return machines
    return replace(machines, muon_dense_shards="even", sources={**machines.sources, **EVEN_SOURCES})


def _fast(plain: Hardware) -> Hardware:
    """Return the same machines with a faster exchange of tokens (docs/speed.md)."""
    # A rule: a layer that is computed again as a whole has no place in the overlapped schedule.
    overlaps = "moe" not in plain.execution.recompute
    assert plain.precision is not None
    return replace(
        plain,
        label=f"{plain.label} fast",
        layout=replace(
            plain.layout, dispatcher="flex", overlap_expert_comm=overlaps, delay_wgrad=overlaps
        ),
        execution=replace(
            plain.execution, gc_interval=100, pad_expert_tokens=plain.precision.compute == "fp8"
        ),
        sources={**plain.sources, **FAST_SOURCES, **(OVERLAP_SOURCES if overlaps else {})},
    )


def _h100(plain: Hardware, *, fast: bool = False) -> Hardware:
    """Return as many cards of 80 GB, with smaller parts of the batch and less kept.

    With context parallelism the expert layers are computed again, which takes less time than
    sequences over two nodes. Without it the fast ones keep everything: it fits by count.
    """
    sources = {**plain.sources, **H100_SOURCES}
    execution = Execution(recompute=("moe_act", "layernorm"))
    if plain.layout.cp > 1:
        execution = Execution(recompute=("moe",))
    elif fast:
        execution = Execution()
        del sources["execution.recompute"]
    return replace(
        plain,
        label=plain.label.replace("H200", "H100"),
        execution=execution,
        micro_batch_size=1,
        sources=sources,
    )


ONE_GPU = Hardware(label="one GPU", layout=Layout(dp=1), source="ours: one GPU")
