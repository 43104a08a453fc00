"""Code of the work-arounds for a CPU, in the order of the table `patches.PATCHES`.

Each function takes an upstream object and returns the one to put in its place; the table gives the
reasons. Those of the optimizer are in `optim`.
"""

from __future__ import annotations

import functools
import queue
import types
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from mellum2_megatron.common.errors import InputError


def set_rng_state_now(original: Callable[..., None]) -> Callable[..., None]:
    """Replace `_set_cuda_rng_state`: the device's random state is the CPU's."""

    @functools.wraps(original)
    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    return set_rng_state


def keep_rng_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that draws random numbers: the state is afterwards as it was."""

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        result = original(*args, **kwargs)
        torch.set_rng_state(state)
        return result

    return build


def initialize_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `initialize_megatron`: allow a CPU, and refuse arguments that need a GPU."""

    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        check_arguments(get_args())
        return original(*args, **kwargs | {"allow_no_cuda": True})

    return initialize_megatron


def check_arguments(args: Namespace) -> None:
    """Refuse Megatron arguments that need a GPU, where upstream would fail later and less clearly.

    Raises:
        InputError: names the first such argument.
    """
    checks = (
        (
            args.distributed_backend != "gloo",
            f"distributed_backend={args.distributed_backend}",
            "processes on CPUs communicate over gloo",
            "gloo",
        ),
        (
            args.async_save,
            "async_save=True",
            "asynchronous saving stages through page-locked memory and CUDA streams",
            "False",
        ),
        (
            args.fp8 or args.fp4,
            f"fp8={args.fp8}, fp4={args.fp4}",
            "8- and 4-bit arithmetic is Transformer Engine's",
            "bf16 alone",
        ),
        (
            args.transformer_impl == "transformer_engine",
            f"transformer_impl={args.transformer_impl}",
            "Transformer Engine runs on GPUs only",
            "local",
        ),
        (
            args.cuda_graph_impl != "none",
            f"cuda_graph_impl={args.cuda_graph_impl}",
            "there are no CUDA graphs on a CPU",
            "none",
        ),
    )
    for needs_gpu, value, rule, instead in checks:
        if needs_gpu:
            raise InputError(
                value, rule=f"{rule} (device=cpu)", fix=f"use {instead}, or device=cuda"
            )


def splits_as_numpy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `maybe_move_tensor_to_cpu`: no copy, but numpy as ever if `as_numpy`."""

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


_ROWS = 32
"""Rows of an expert's input, in BF16, are filled up to a multiple of it."""


def whole_blocks_of_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `SequentialMLP.forward`: zeros fill each expert's tokens up to `_ROWS`.

    The outputs of the zeros are dropped, so that neither they nor their gradients count.
    """

    @functools.wraps(original)
    def forward(
        experts: Any, hidden_th: torch.Tensor, tokens_e: torch.Tensor, probs_t: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        # Products of other types are not made by oneDNN.
        if hidden_th.dtype != torch.bfloat16:
            return original(experts, hidden_th, tokens_e, probs_t)  # type: ignore[no-any-return]
        counts = tokens_e.tolist()
        missing = [-count % _ROWS for count in counts]
        zeros_th = hidden_th.new_zeros(_ROWS, hidden_th.size(1))
        zeros_t = probs_t.new_zeros(_ROWS)
        filled_th, filled_t, sizes = [], [], []
        for hidden, probs, count, more in zip(
            torch.split(hidden_th, counts),
            torch.split(probs_t, counts),
            counts,
            missing,
            strict=True,
        ):
            filled_th += [hidden, zeros_th[:more]]
            filled_t += [probs, zeros_t[:more]]
            sizes += [count, more]
        filled_e = tokens_e + torch.tensor(missing, dtype=tokens_e.dtype)
        output_th, bias = original(experts, torch.cat(filled_th), filled_e, torch.cat(filled_t))
        return torch.cat(torch.split(output_th, sizes)[::2]), bias

    return forward


def results_in_process(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `get_write_results_queue`: one queue of this process, not a manager's."""
    results: queue.Queue[Any] | None = None

    @functools.wraps(original)
    def get_write_results_queue(mp_mode: str = "spawn") -> queue.Queue[Any]:
        nonlocal results
        results = results or queue.Queue()
        return results

    return get_write_results_queue


def partition_documents(_: object) -> types.SimpleNamespace:
    """Stand for the module `transformer_engine_torch`, of which one function is used."""

    def thd_get_partitioned_indices(
        cu_seqlens: torch.Tensor, total_tokens: int, world_size: int, rank: int
    ) -> torch.Tensor:
        """Return stream positions of one context-parallel rank, `[t / cp]`."""
        from mellum2_megatron.model.context_parallel import partition_indices

        assert cu_seqlens[-1] == total_tokens, "documents that do not fill the stream"
        return partition_indices(cu_seqlens.tolist(), world_size, rank)

    return types.SimpleNamespace(thd_get_partitioned_indices=thd_get_partitioned_indices)
