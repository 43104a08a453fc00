"""Ranks that add up gradients in one order, wherever these lie in their buffer.

gloo and NCCL start the sum of each share at another rank, so a weight's gradient depends on its
place by a rounding.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.faults.fault_worker import reload as reload_run
from tests.training.train_worker import train as train_run


def train(run_file: str) -> bool:
    """Train a run, with gradients summed by rank."""
    _sum_by_rank()
    return train_run(run_file)


def reload(run_file: str, copy: str) -> bool:
    """Save what was loaded into the folder ``copy``, then train, with gradients summed by rank."""
    _sum_by_rank()
    return reload_run(run_file, copy)


def _sum_by_rank() -> None:
    from megatron.core.distributed import param_and_grad_buffer

    class Done:
        def wait(self) -> None:
            pass

    def reduce_scatter(
        output: torch.Tensor, given: torch.Tensor, *, op: Any, group: Any, async_op: bool
    ) -> Done:
        assert op == torch.distributed.ReduceOp.SUM
        gathered = [torch.empty_like(given) for _ in range(group.size())]
        torch.distributed.all_gather(gathered, given, group=group)
        total = gathered[0]
        for other in gathered[1:]:
            total += other
        output.copy_(total.chunk(group.size())[group.rank()])
        return Done()

    param_and_grad_buffer.dist_reduce_scatter_func = reduce_scatter
