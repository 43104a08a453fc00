"""Layout and messages of the 12B's dense matrices in even shares, at its true numbers of ranks."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.planning.gradient_buffers import ownership
from mellum2_megatron.planning.rank_weights import local_weights, uses_muon
from mellum2_megatron.recipes import recipe

RECIPE = "mellum2_12b_pretrain_phase1"
BUCKET = 40_000_000
"""Least elements of a bucket; Megatron takes a million for each rank if that is more."""


class FakeGroup:
    """The group of data-parallel ranks as one of them sees it. No process stands behind it."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks


def run_at(ranks: int) -> Run:
    return apply_overrides(
        recipe(RECIPE), [f"layout.dp={ranks}", "optimizer.muon_dense_shards=even"]
    )


def dense_parameters(run: Run) -> list[torch.nn.Parameter]:
    """Return the dense matrices of the te backend at their true shapes, without memory."""
    return [
        torch.nn.Parameter(torch.empty(weight.shape, device="meta"))
        for weight in local_weights(run.architecture, run.layout, "te")
        if weight.component != "experts" and uses_muon(weight, run.optimizer)
    ]


def make_buckets(layout: Any) -> list[Any]:
    """Return Megatron's buckets of a layout, as far as the exchange reads them."""
    buckets = [
        SimpleNamespace(
            grad_data=torch.empty(end - start, device="meta"), params_list=[], param_to_index={}
        )
        for start, end in layout.bucket_indices
    ]
    for parameter, (start, end, number) in layout.param_index_map.items():
        offset = layout.bucket_indices[number][0]
        buckets[number].params_list.append(parameter)
        buckets[number].param_to_index[parameter] = (start - offset, end - offset)
    return buckets


@pytest.mark.parametrize("ranks", [256, 128, 8])
def test_every_element_reaches_its_owner_once(ranks: int) -> None:
    """All ranks' lists of messages agree, and together they are what the plan counts."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    from mellum2_megatron.muon.even_shares import EvenSharesOptimizer, Exchange

    run = run_at(ranks)
    parameters = dense_parameters(run)
    arguments = (
        parameters,
        max(BUCKET, 1_000_000 * ranks),
        ranks,
        SimpleNamespace(pad_buckets_for_high_nccl_busbw=False),
    )
    layout = EvenSharesOptimizer._compute_per_buffer_param_layout(*arguments)
    whole = LayerWiseDistributedOptimizer._compute_per_buffer_param_layout(*arguments)
    planned = next(each for each in ownership(run, ranks, "te") if each.group == "dense")
    assert layout.whole == whole
    assert [end - start for start, end in layout.bucket_indices] == list(planned.buckets)
    # Nothing is empty but what rounds a bucket up to a multiple of the ranks.
    assert planned.buffer - sum(planned.elements) < max(ranks, 128) * len(planned.buckets)

    # Owners: of Megatron's whole layout, read off here from its places.
    owners = {}
    for parameter, (start, _, number) in whole.param_index_map.items():
        first, last = whole.bucket_indices[number]
        owners[parameter] = (start - first) // ((last - first) // ranks)
    loads = Counter(
        {rank: sum(p.numel() for p in parameters if owners[p] == rank) for rank in range(ranks)}
    )
    assert [loads[rank] for rank in range(ranks)] == planned.elements

    buckets = make_buckets(layout)
    exchanges = [Exchange(FakeGroup(rank, ranks), buckets, owners) for rank in range(ranks)]
    moved, incoming = 0, Counter[int]()
    for holder, exchange in enumerate(exchanges):
        assert not exchange._held[holder]
        assert not exchange._owned[holder]
        for owner, spans in enumerate(exchange._held):
            assert spans == exchanges[owner]._owned[holder]
            for span in spans:
                share = buckets[span.bucket].grad_data.numel() // ranks
                assert holder * share <= span.start < span.end <= (holder + 1) * share
                incoming[owner] += span.end - span.start
        moved += sum(span.end - span.start for spans in exchange._held for span in spans)
    assert moved == planned.exchanged
    # An owner gets its matrices but for what lies in its own share.
    assert all(incoming[rank] <= loads[rank] for rank in range(ranks))
    assert moved > sum(planned.elements) * (1 - 2 / ranks)


def test_experts_keep_whole_shares() -> None:
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    from mellum2_megatron.muon.even_shares import EvenLayout, EvenSharesOptimizer

    experts = [torch.nn.Parameter(torch.empty(3, 96, device="meta")) for _ in range(5)]
    for parameter in experts:
        parameter.allreduce = False  # type: ignore[attr-defined]
    arguments = (experts, None, 2, SimpleNamespace(pad_buckets_for_high_nccl_busbw=False))
    layout = EvenSharesOptimizer._compute_per_buffer_param_layout(*arguments)
    assert not isinstance(layout, EvenLayout)
    assert layout == LayerWiseDistributedOptimizer._compute_per_buffer_param_layout(*arguments)


def test_gradients_beside_the_buffer_are_refused() -> None:
    from mellum2_megatron.muon.even_shares import require_buffered_gradients

    require_buffered_gradients(SimpleNamespace(extra_main_grads=[]))
    with pytest.raises(InputError, match=r"muon_dense_shards=even.*--ddp-param-name-patterns"):
        require_buffered_gradients(SimpleNamespace(extra_main_grads=[torch.zeros(1)]))
