"""Memory and time of collecting Adam's state for a save, on every rank and on one.

::

    python -m benchmarks.checkpoint_gather             # docs/checkpoints.md, "On one rank"
    python -m benchmarks.checkpoint_gather --measure 4 --elements 48000000

The table is a count for the 12B's first phase (`checkpoint.any_layout`, with and without
`checkpoint.gather_on_one_rank`). The measurement runs Megatron's own function over gloo on this
machine, where "GPU" buffers lie in main memory too, and prints each rank's peak and the time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.muon_layouts import RECIPE, bucket_lengths
from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.planning.gradient_buffers import bucket_size
from mellum2_megatron.planning.rank_weights import local_weights, uses_muon
from mellum2_megatron.recipes import recipe

RANKS = (256, 8)
NODE = 8
"""GPUs of a node."""

ELEMENT = 4
"""Bytes of an element: the state is collected in FP32."""

KEYS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Bytes of one save.

    Attributes:
        way: where the state is collected.
        first, other: peak main memory of a group's first rank, and of another.
        gpu: peak GPU memory of a rank.
        received: what the first rank receives.
        written: what the busiest rank writes of this state. Tensors are written whole, so it is at
            least the largest.
    """

    way: str
    first: int
    other: int
    gpu: int
    received: int
    written: int

    @property
    def node(self) -> int:
        """Main memory of the first node."""
        return self.first + (NODE - 1) * self.other


def costs(run: Run, ranks: int) -> Iterator[Cost]:
    """Yield the cost on every rank and on one, of a Muon run whose ranks hold all dense weights.

    Megatron fills three arrays of the state's length, and collects one bucket of one array at a
    time, in `ranks` parts (core/optimizer/distrib_optimizer.py:1304-1402, 0.19.2). Where the parts
    are joined, the bucket before is still there in one piece: three buckets. Over NCCL the parts
    lie on the GPU first, and once more in the one piece that NCCL fills.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    sizes = [
        weight.numel
        for weight in local_weights(run.architecture, run.layout, "te")
        if not uses_muon(weight, run.optimizer)
    ]
    most = bucket_size(run, ranks, stage=0, chunk=0)
    buckets = bucket_lengths(DistributedOptimizer, sizes, most, ranks)
    largest = ELEMENT * max(buckets)
    state = len(KEYS) * ELEMENT * sum(sizes)
    share = largest // ranks
    own = len(KEYS) * share * min(2, len(buckets))
    collecting = state + 3 * largest + own
    received = state - state // ranks
    yield Cost(
        way="every rank (default)",
        first=collecting,
        other=collecting,
        gpu=2 * largest + share,
        received=received,
        written=max(ELEMENT * max(sizes), state // ranks),
    )
    yield Cost(
        way="one rank",
        first=collecting,
        other=own,
        gpu=0,
        received=received,
        written=state,
    )


def table(ranks: Sequence[int] = RANKS) -> str:
    """Return the costs of the 12B's first phase as a Markdown table, in GB."""
    lines = [
        "| ranks | collected on | first rank | another | first node | GPU | first rank receives "
        "| busiest rank writes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count in ranks:
        run = apply_overrides(recipe(RECIPE), [f"layout.dp={count}"])
        for each in costs(run, count):
            amounts = (each.first, each.other, each.node, each.gpu, each.received, each.written)
            figures = " | ".join(f"{amount / 1e9:.2f}" for amount in amounts)
            lines.append(f"| {count} | {each.way} | {figures} |")
    return "\n".join(lines)


def measure(ranks: int, elements: int) -> str:
    """Return time and peak memory of both ways on this machine, as a Markdown table.

    Args:
        ranks: number of gloo processes.
        elements: elements of the weights, in two buckets.
    """
    lines = ["| collected on | seconds | peak of each rank, GB |", "|---|---|---|"]
    spawn = multiprocessing.get_context("spawn")
    for way, one_rank in (("every rank", False), ("one rank", True)):
        results = spawn.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                spawn.Process(
                    target=_gather, args=(rank, ranks, folder, elements, one_rank, results)
                )
                for rank in range(ranks)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError("a rank failed; its message stands above")
        found = sorted(results.get() for _ in processes)
        peaks = ", ".join(f"{peak / 1e9:.2f}" for _, _, peak in found)
        lines.append(f"| {way} | {max(seconds for _, seconds, _ in found):.2f} | {peaks} |")
    return "\n".join(lines)


def _gather(
    rank: int, ranks: int, folder: str, elements: int, one_rank: bool, results: Any
) -> None:
    """Collect the state once as a small rehearsal and once in full; report rank, time and peak."""
    from mellum2_megatron import cpu

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    cpu.activate()
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    store = torch.distributed.FileStore(f"{folder}/store", ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    for size in (ranks * 2, elements):
        bucket = size // 2 // ranks * ranks
        optimizer = _state(bucket, rank, ranks)
        base = _memory("VmRSS")
        torch.distributed.barrier()
        begin = time.perf_counter()
        state = DistributedOptimizer.get_parameter_state_dp_zero(
            optimizer, use_gloo_comm=one_rank, return_on_all_ranks=not one_rank
        )
        torch.distributed.barrier()
        seconds = time.perf_counter() - begin
    peak = _memory("VmHWM") - base
    assert (state is None) == (one_rank and rank > 0)
    if state is not None:
        values = state[0][torch.bfloat16]["exp_avg"]
        owners = torch.arange(ranks, dtype=torch.float32).repeat_interleave(bucket // ranks)
        assert torch.equal(values, owners.repeat(2))
    results.put((rank, seconds, peak))


def _state(bucket: int, rank: int, ranks: int) -> Any:
    """Return what Megatron's function reads of an optimizer with two buckets of one weight each."""
    import torch

    share = bucket // ranks
    values = {key: torch.full((share,), float(rank)) for key in KEYS}
    place = SimpleNamespace(start=0, end=share)
    grads = torch.empty(bucket, device="meta")
    group = torch.distributed.group.WORLD
    return SimpleNamespace(
        data_parallel_group=group,
        data_parallel_group_gloo=group,
        optimizer_state_keys=KEYS[1:],
        gbuf_ranges=[{torch.bfloat16: [{"param_map": {0: {"gbuf_local": place}}}] * 2}],
        buffers=[
            SimpleNamespace(
                numel_unpadded=2 * bucket,
                buckets=[SimpleNamespace(grad_data=grads, numel_unpadded=bucket)] * 2,
            )
        ],
        _get_main_param_and_optimizer_states=lambda _: values,
    )


def _memory(field: str) -> int:
    """Return a field of this process' status in bytes: "VmRSS" or, for the peak, "VmHWM"."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    """Write a table to stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="world sizes to count")
    parser.add_argument("--measure", type=int, metavar="RANKS", help="measure on so many processes")
    parser.add_argument("--elements", type=int, default=48_000_000, help="elements to measure with")
    args = parser.parse_args()
    text = measure(args.measure, args.elements) if args.measure else table(args.ranks)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
