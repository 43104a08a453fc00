"""Counts the bytes that Megatron's collectives make a rank send, by the group they run in."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

SMALL = 512
"""Floats of a tensor below which it is a statistic (losses, norms' gradients, masks) and not counted."""


@contextlib.contextmanager
def counting() -> Iterator[dict[str, float]]:
    """Count within the block, in the ring algorithms' terms; integers are not counted either."""
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import p2p_communication
    from megatron.core.tensor_parallel import layers, mappings

    names = {
        id(group): name
        for name, group in (
            ("tp", mpu.get_tensor_model_parallel_group()),
            ("cp", mpu.get_context_parallel_group()),
            ("pp", mpu.get_pipeline_model_parallel_group()),
            ("ep", mpu.get_expert_model_parallel_group()),
            ("ep", mpu.get_expert_tensor_parallel_group()),
            ("ep", mpu.get_expert_tensor_and_model_parallel_group()),
            ("dp", mpu.get_data_parallel_group(with_context_parallel=True)),
            ("dp", mpu.get_expert_data_parallel_group()),
            ("dp", mpu.get_embedding_group(check_initialized=False)),
        )
    }
    sent: dict[str, float] = defaultdict(float)

    def note(group: Any, tensor: torch.Tensor, factor: float) -> None:
        if tensor.is_floating_point() and tensor.numel() >= SMALL and id(group) in names:
            sent[names[id(group)]] += tensor.nbytes * factor

    def ring(group: Any) -> float:
        return float(group.size() - 1) / float(group.size())

    distributed: Any = torch.distributed
    original = {
        name: getattr(distributed, name)
        for name in (
            "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "reduce_scatter", "all_to_all_single",
            "all_reduce",
        )
    }  # fmt: skip

    def gather(output: torch.Tensor, given: torch.Tensor, group: Any = None, **rest: Any) -> Any:
        note(group, output, ring(group))
        return original["all_gather_into_tensor"](output, given, group=group, **rest)

    def scatter(output: torch.Tensor, given: torch.Tensor, group: Any = None, **rest: Any) -> Any:
        note(group, given, ring(group))
        return original["reduce_scatter_tensor"](output, given, group=group, **rest)

    def gather_uneven(outputs: list[torch.Tensor], given: torch.Tensor, group: Any = None, **rest: Any) -> Any:
        note(group, given, group.size() - 1)
        return original["all_gather"](outputs, given, group=group, **rest)

    def scatter_uneven(output: torch.Tensor, given: list[torch.Tensor], group: Any = None, **rest: Any) -> Any:
        for rank, tensor in enumerate(given):
            note(group, tensor, float(rank != group.rank()))
        return original["reduce_scatter"](output, given, group=group, **rest)

    def exchange(output: torch.Tensor, given: torch.Tensor, *args: Any, group: Any = None, **rest: Any) -> Any:
        splits = rest.get("input_split_sizes", args[1] if len(args) > 1 else None)
        kept = 1 / group.size() if splits is None else int(splits[group.rank()]) / max(1, len(given))
        note(group, given, 1 - kept)
        return original["all_to_all_single"](output, given, *args, group=group, **rest)

    def reduce(tensor: torch.Tensor, *args: Any, group: Any = None, **rest: Any) -> Any:
        if names.get(id(group)) == "dp":
            note(group, tensor, 2 * ring(group))
        return original["all_reduce"](tensor, *args, group=group, **rest)

    def to_neighbours(send: Any) -> Any:
        def wrapped(**tensors: Any) -> Any:
            for name in ("tensor_send_prev", "tensor_send_next"):
                if tensors[name] is not None:
                    note(tensors["group"], tensors[name], 1.0)
            return send(**tensors)

        return wrapped

    with contextlib.ExitStack() as stack:
        replaced = [
            (distributed, "all_gather_into_tensor", gather),
            (distributed, "reduce_scatter_tensor", scatter),
            (distributed, "all_to_all_single", exchange),
            (distributed, "all_reduce", reduce),
            (distributed, "all_gather", gather_uneven),
            (distributed, "reduce_scatter", scatter_uneven),
            (p2p_communication, "_p2p_ops", to_neighbours(p2p_communication._p2p_ops)),
            (p2p_communication, "_batched_p2p_ops", to_neighbours(p2p_communication._batched_p2p_ops)),
            (mappings, "dist_all_gather_func", gather),
            (mappings, "dist_reduce_scatter_func", scatter),
            (layers, "dist_all_gather_func", gather),
            (layers, "dist_reduce_scatter_func", scatter),
        ]
        for module, name, replacement in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, replacement)
        yield sent
