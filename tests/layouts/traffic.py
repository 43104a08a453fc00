"""Count of the bytes that a rank sends in Megatron's collectives, by parallelism."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

SMALL = 512
"""Float tensors with fewer elements are statistics (loss, norm, mask), and not counted."""

COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_to_all_single",
    "all_reduce",
)


@contextlib.contextmanager
def counting() -> Iterator[dict[str, float]]:
    """Count within the block, as ring algorithms send; integer tensors are not counted."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.pipeline_parallel import p2p_communication
    from megatron.core.tensor_parallel import layers, mappings

    counter = Counter()
    replaced = [(torch.distributed, name, getattr(counter, name)) for name in COLLECTIVES]
    for module in (mappings, layers, param_and_grad_buffer):
        replaced.append((module, "dist_all_gather_func", counter.all_gather_into_tensor))
        replaced.append((module, "dist_reduce_scatter_func", counter.reduce_scatter_tensor))
    for name in ("_p2p_ops", "_batched_p2p_ops"):
        replaced.append(
            (p2p_communication, name, counter.to_neighbours(getattr(p2p_communication, name)))
        )
    with contextlib.ExitStack() as stack:
        for module, name, replacement in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, replacement)
        yield counter.sent


class Counter:
    """torch's collectives, each adding the bytes of its call to `sent`.

    Attributes:
        sent: bytes sent by this rank, by parallelism.
    """

    def __init__(self) -> None:
        from megatron.core import parallel_state as mpu

        groups = (
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
        self.names = {id(group): name for name, group in groups}
        self.sent: dict[str, float] = defaultdict(float)
        self.original: dict[str, Any] = {
            name: getattr(torch.distributed, name) for name in COLLECTIVES
        }

    def note(self, group: Any, tensor: torch.Tensor, factor: float) -> None:
        """Add `factor` times the size of a tensor, if it is a float tensor worth counting."""
        if tensor.is_floating_point() and tensor.numel() >= SMALL and id(group) in self.names:
            self.sent[self.names[id(group)]] += tensor.nbytes * factor

    def all_gather_into_tensor(
        self, output: torch.Tensor, given: torch.Tensor, group: Any = None, **rest: Any
    ) -> Any:
        self.note(group, output, ring(group))
        return self.original["all_gather_into_tensor"](output, given, group=group, **rest)

    def reduce_scatter_tensor(
        self, output: torch.Tensor, given: torch.Tensor, group: Any = None, **rest: Any
    ) -> Any:
        self.note(group, given, ring(group))
        return self.original["reduce_scatter_tensor"](output, given, group=group, **rest)

    def all_gather(
        self, outputs: list[torch.Tensor], given: torch.Tensor, group: Any = None, **rest: Any
    ) -> Any:
        self.note(group, given, group.size() - 1)
        return self.original["all_gather"](outputs, given, group=group, **rest)

    def reduce_scatter(
        self, output: torch.Tensor, given: list[torch.Tensor], group: Any = None, **rest: Any
    ) -> Any:
        for rank, tensor in enumerate(given):
            self.note(group, tensor, float(rank != group.rank()))
        return self.original["reduce_scatter"](output, given, group=group, **rest)

    def all_to_all_single(
        self, output: torch.Tensor, given: torch.Tensor, *args: Any, group: Any = None, **rest: Any
    ) -> Any:
        splits = rest.get("input_split_sizes", args[1] if len(args) > 1 else None)
        kept = (
            1 / group.size() if splits is None else int(splits[group.rank()]) / max(1, len(given))
        )
        self.note(group, given, 1 - kept)
        return self.original["all_to_all_single"](output, given, *args, group=group, **rest)

    def all_reduce(self, tensor: torch.Tensor, *args: Any, group: Any = None, **rest: Any) -> Any:
        if self.names.get(id(group)) == "dp":
            self.note(group, tensor, 2 * ring(group))
        return self.original["all_reduce"](tensor, *args, group=group, **rest)

    def to_neighbours(self, send: Any) -> Any:
        """Wrap a function of Megatron's that sends to the neighbouring pipeline stages."""

        def wrapped(**tensors: Any) -> Any:
            for name in ("tensor_send_prev", "tensor_send_next"):
                if tensors[name] is not None:
                    self.note(tensors["group"], tensors[name], 1.0)
            return send(**tensors)

        return wrapped


def ring(group: Any) -> float:
    """Return the share of a gathered tensor that each rank of a ring sends."""
    return float(group.size() - 1) / float(group.size())
