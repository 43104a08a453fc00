"""One rank of the attention tests: its share of each problem, forward and backward."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from tests.model.packing import packed_documents

HEADS, GROUPS, DIMENSION = 4, 2, 4
SCALE = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One attention to compute.

    Attributes:
        window: keys that a query sees, its own included; None for all.
        rooms: positions of each document in the stream, padding included.
        lengths: real tokens of each document; None for a batch of two sequences that is not packed.
        block: largest number of queries in one call of the kernel.
    """

    window: int | None
    rooms: tuple[int, ...]
    lengths: tuple[int, ...] | None
    block: int = 2048

    @property
    def batch(self) -> int:
        return 2 if self.lengths is None else 1


def inputs(problem: Problem) -> tuple[torch.Tensor, ...]:
    """Return query, key, value and output gradient of the stream, `[t, b, heads, d]`, float64."""
    generator = torch.Generator().manual_seed(3)
    shape = (sum(problem.rooms), problem.batch)
    sizes = (HEADS, GROUPS, GROUPS, HEADS)
    return tuple(
        torch.randn(*shape, n, DIMENSION, dtype=torch.float64, generator=generator) for n in sizes
    )


def held(problem: Problem, cp: int, rank: int) -> list[int]:
    """Return the positions in the stream of a rank's tokens: its two chunks of every document."""
    places = []
    for start, room in zip(
        itertools.accumulate(problem.rooms, initial=0), problem.rooms, strict=False
    ):
        chunk = room // (2 * cp)
        for number in sorted({rank, 2 * cp - 1 - rank}):
            places += range(start + number * chunk, start + (number + 1) * chunk)
    return places


def attend(problems: list[Problem]) -> list[tuple[torch.Tensor, ...]]:
    """Return output and gradients of query, key and value of this rank's tokens, by problem."""
    from megatron.core import parallel_state as mpu
    from megatron.core.transformer.enums import AttnMaskType

    from mellum2_megatron.model import core_attention
    from mellum2_megatron.model.transformer_config import transformer_config
    from tests.layouts.worker import ARCHITECTURE

    cp = torch.distributed.get_world_size()
    mpu.initialize_model_parallel(context_parallel_size=cp)
    outcomes = []
    for problem in problems:
        core_attention.BLOCK = problem.block
        config = transformer_config(ARCHITECTURE, context_parallel_size=cp)
        config.window_size = None if problem.window is None else (problem.window - 1, 0)
        attention = core_attention.TorchCoreAttention(
            config, 1, AttnMaskType.causal, "self", softmax_scale=SCALE
        )
        places = held(problem, cp, mpu.get_context_parallel_rank())
        tensors = [tensor[places] for tensor in inputs(problem)]
        packed = None
        if problem.lengths is not None:
            packed = packed_documents(problem.lengths, problem.rooms)
            tensors = [tensor.squeeze(1) for tensor in tensors]  # THD has no batch dimension
        *leaves, weight = (tensor.clone() for tensor in tensors)
        for leaf in leaves:
            leaf.requires_grad_()
        output = attention(*leaves, None, packed_seq_params=packed)
        gradients = torch.autograd.grad((output * weight.flatten(-2)).sum(), leaves)
        outcomes.append((output.detach(), *gradients))
    return outcomes
