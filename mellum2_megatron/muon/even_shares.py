"""Dense Muon matrices in even shares (`optimizer.muon_dense_shards`): one extension of Megatron.

Megatron's layer-wise optimizer keeps each matrix whole in one rank's share of a bucket. All shares
are as long as the largest, so with more ranks than matrices most of a bucket is empty, and it
closes only with the last gradient (docs/optimizer.md, "Owners of the matrices").

Here the buffer of the dense matrices has the layout of Adam's: matrices lie one after another, and
a share ends anywhere. Reduce-scatter, gather and their overlap stay Megatron's. The optimizer's
step gets two exchanges, one around each end:

- before it, owners collect the reduced gradients of their matrices from the ranks that hold them;
- after it, owners hand the updated weights out to the same ranks, and the gather goes on from
  there.

Owners are those of Megatron's own layout. So a rank has the same optimizer state with and without
this extension, and a checkpoint of one is a checkpoint of the other. Experts keep whole matrices.

Upstream facts are of megatron-core 0.19.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout, PerBufferParamLayout

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Optimizer
from mellum2_megatron.upstream import patching
from mellum2_megatron.upstream.patching import Patch


@dataclass
class EvenLayout(PerBufferParamLayout):
    """Layout of a buffer in even shares.

    Attributes:
        whole: Megatron's layout of the same matrices in whole shares, which decides their owners.
    """

    whole: PerBufferParamLayout = field(default_factory=PerBufferParamLayout)


class Span(NamedTuple):
    """Part of a matrix in one rank's share of a bucket.

    Attributes:
        bucket: index of the bucket in its buffer.
        start, end: elements of the bucket.
    """

    bucket: int
    start: int
    end: int


class Exchange:
    """Moves the matrices of one buffer between their owners and the ranks that hold the shares.

    A span has the same place in every rank's buffers, so both ways are copies without a shift, and
    need no memory beside the messages: gradients of a rank's share and of its matrices (FP32 or
    BF16), then their weights (BF16).

    Args:
        group: data-parallel ranks that share the buffer.
        buckets: Megatron's buckets of the buffer.
        owners: rank in the group that updates each matrix.
    """

    def __init__(self, group: Any, buckets: Sequence[Any], owners: dict[Any, int]) -> None:
        self.group, self.buckets = group, buckets
        ranks, own = group.size(), group.rank()
        # Spans of this rank's shares by their owner, and of its matrices by their holder. Every
        # rank goes through the buffer in the same order, so both ends of a message agree.
        self._held: list[list[Span]] = [[] for _ in range(ranks)]
        self._owned: list[list[Span]] = [[] for _ in range(ranks)]
        for index, bucket in enumerate(buckets):
            share = bucket.grad_data.numel() // ranks
            for parameter in bucket.params_list:
                owner = owners[parameter]
                first, last = bucket.param_to_index[parameter]
                for holder, start, end in shares_of(first, last, share):
                    if holder == owner:
                        continue
                    if holder == own:
                        self._held[owner].append(Span(index, start, end))
                    elif owner == own:
                        self._owned[holder].append(Span(index, start, end))

    def collect_gradients(self) -> None:
        """Fill the gradients of this rank's matrices with what other ranks have reduced."""
        self._move("grad_data", self._held, self._owned)

    def hand_out_weights(self) -> None:
        """Fill this rank's shares of the weights with what the matrices' owners have computed."""
        self._move("param_data", self._owned, self._held)

    def _move(
        self,
        data: Literal["grad_data", "param_data"],
        outgoing: list[list[Span]],
        incoming: list[list[Span]],
    ) -> None:
        sources, targets = self._views(data, outgoing), self._views(data, incoming)
        empty = getattr(self.buckets[0], data).new_empty(0)
        message = torch.cat([empty, *sources])
        received = message.new_empty(sum(map(len, targets)))
        torch.distributed.all_to_all_single(
            received,
            message,
            output_split_sizes=list(map(_elements, incoming)),
            input_split_sizes=list(map(_elements, outgoing)),
            group=self.group,
        )
        parts = torch.split(received, [len(view) for view in targets])
        for view, part in zip(targets, parts, strict=True):
            view.copy_(part)

    def _views(self, data: str, spans: list[list[Span]]) -> list[torch.Tensor]:
        """Return the parts of the buckets' flat data that the spans name, by rank."""
        flat = [getattr(bucket, data) for bucket in self.buckets]
        return [flat[one.bucket][one.start : one.end] for one in itertools.chain(*spans)]


def shares_of(start: int, end: int, share: int) -> Iterable[tuple[int, int, int]]:
    """Yield (rank, start, end) for each share of ``share`` elements in ``[start, end)``.

    >>> list(shares_of(3, 9, 4))
    [(0, 3, 4), (1, 4, 8), (2, 8, 9)]
    """
    while start < end:
        rank = start // share
        stop = min(end, (rank + 1) * share)
        yield rank, start, stop
        start = stop


def _elements(spans: Sequence[Span]) -> int:
    return sum(one.end - one.start for one in spans)


class EvenSharesOptimizer(LayerWiseDistributedOptimizer):
    """`LayerWiseDistributedOptimizer` whose dense matrices lie in even shares.

    Arguments are upstream's.

    Raises:
        InputError: gradients of a matrix are accumulated outside of the buffer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._exchanges: list[Exchange] = []
        if self.dp_cp is None or self.dp_cp.size() == 1:
            return
        owners = {
            parameter: rank
            for rank, parameters in enumerate(self.dp_cp_params_list)
            for parameter in parameters
        }
        for chunk in self.model_chunks:
            for buffer in chunk.buffers:
                if buffer.params[0].is_managed_by_layer_wise_optimizer:
                    require_buffered_gradients(buffer)
                    self._exchanges.append(Exchange(self.dp_cp, buffer.buckets, owners))

    @staticmethod
    def _compute_per_buffer_param_layout(
        params: list[torch.nn.Parameter],
        bucket_size: int | None,
        data_parallel_world_size: int,
        ddp_config: Any,
        param_indices: list[int] | None = None,
    ) -> PerBufferParamLayout:
        """Return the layout of one buffer of matrices: even for dense ones, upstream's for experts.

        `compute_full_param_layout` calls it by the name of the class that this one replaces
        (core/optimizer/layer_wise_optimizer.py:418).
        """
        arguments = (bucket_size, data_parallel_world_size, ddp_config, param_indices)
        whole = LayerWiseDistributedOptimizer._compute_per_buffer_param_layout(params, *arguments)
        # Megatron's mark of parameters with data-parallel ranks of their own
        # (core/distributed/param_and_grad_buffer.py:918).
        if not getattr(params[0], "allreduce", True):
            return whole
        even = DistributedOptimizer._compute_per_buffer_param_layout(params, *arguments)
        return EvenLayout(**vars(even), whole=whole)

    def _shard_params_from_layout(
        self, optimizers: Any, full_param_layouts: Any, *sizes: int
    ) -> None:
        """Divide the matrices among their owners: those of the whole layouts."""
        whole = [
            FullParamLayout(
                layouts={
                    key: layout.whole if isinstance(layout, EvenLayout) else layout
                    for key, layout in full.layouts.items()
                }
            )
            for full in full_param_layouts
        ]
        super()._shard_params_from_layout(optimizers, whole, *sizes)

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Collect gradients, then prepare them as upstream does; return true if one is inf/nan."""
        for exchange in self._exchanges:
            exchange.collect_gradients()
        found: bool = super().prepare_grads()
        return found

    def _step(self) -> bool:
        """Update the matrices of this rank, then hand their weights out, before any gather."""
        success: bool = super()._step()
        for exchange in self._exchanges:
            exchange.hand_out_weights()
        return success


def require_buffered_gradients(buffer: Any) -> None:
    """Refuse a buffer whose weights accumulate their gradients outside of it.

    Raises:
        InputError: some do. Megatron would copy the part of them that this rank has reduced back
            before the exchange (core/distributed/param_and_grad_buffer.py:842).
    """
    if buffer.extra_main_grads:
        raise InputError(
            "optimizer.muon_dense_shards=even with gradients in FP32 outside of their buffer",
            rule="owners collect gradients in the buffer",
            fix="leave --ddp-param-name-patterns-for-fp32-local-accumulation out, "
            "or set optimizer.muon_dense_shards=whole",
        )


def _even(_: Callable[..., Any]) -> type[EvenSharesOptimizer]:
    return EvenSharesOptimizer


PATCH = Patch(
    name="even-shares",
    target="megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer",
    replacement=_even,
    why="core/optimizer/__init__.py:972 and training/training.py:1637 name the class; neither the "
    "optimizer's configuration nor its factory takes another",
)
"""Puts `EvenSharesOptimizer` in the place of its base, where layouts and optimizers are made."""


def activate(optimizer: Optimizer) -> None:
    """Apply the extension for the rest of the process, if the settings ask for it.

    Call it before the model is wrapped for data parallelism. Calling it again does nothing.

    Raises:
        InputError: another megatron-core is installed than the one it was written for.
    """
    if optimizer.muon_dense_shards == "even":
        patching.install((PATCH,))
