"""One process as a complete Megatron world, to build, score or convert a model in place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.cpu.activation import is_active

_DEFAULT_SEED = 1234


def init_single_process(seed: int = _DEFAULT_SEED) -> bool:
    """Initialise torch.distributed (gloo, one rank), Megatron's groups and random number trackers.

    The store lives in memory and gloo stays on loopback, so such processes run side by side.

    Args:
        seed: seed of torch and of Megatron's random number trackers.

    Returns:
        True if this call initialised them; the caller then owes a `teardown`. False if they were
        initialised before.

    Raises:
        InputError: `activate` has not been called.
    """
    if not is_active():
        raise InputError(
            "cpu.init_single_process()",
            rule="the CPU backend is not active",
            fix="call mellum2_megatron.cpu.activate() first, before megatron is imported",
        )
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():
        return False
    if not torch.distributed.is_initialized():
        # gloo listens even for a single rank, on the interface that the host's name stands for.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # no type stub has it
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return True


def teardown() -> None:
    """Undo `init_single_process`: Megatron's groups, then torch.distributed."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def single_process(seed: int = _DEFAULT_SEED) -> Iterator[None]:
    """Run `init_single_process` for a ``with`` block; a world initialised before stays as it is."""
    is_ours = init_single_process(seed)
    try:
        yield
    finally:
        if is_ours:
            teardown()
