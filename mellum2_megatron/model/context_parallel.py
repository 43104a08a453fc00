"""How context parallelism divides sequences, in plain torch.

A late query of causal attention sees more keys than an early one. To give every rank the same work,
a sequence is cut into `2 * cp` equal chunks and rank `r` holds chunks `r` and `2 * cp - 1 - r`, in
that order. Packed documents are divided one by one in the same way. This is the layout of Megatron
(megatron/core/utils.py:2386 and 2452, 0.19.2) and of Transformer Engine.

Boundaries are cumulative lengths `(0, end of document 0, end of document 1, ...)`; a sequence that
is not packed is one document.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


def partition_indices(boundaries: Sequence[int], cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return the positions, in the whole stream, of the tokens that a rank holds, in the rank's
    order: `[t / cp]`.

    The same as Transformer Engine's `thd_get_partitioned_indices`, which has no CPU version.

    Raises:
        ValueError: a document's length is not a multiple of `2 * cp_size`.
    """
    if cp_size == 1:
        return torch.arange(boundaries[-1])
    chunks = []
    for start, end in itertools.pairwise(boundaries):
        if (end - start) % (2 * cp_size):
            raise ValueError(
                f"a document of {end - start} tokens at {start}: context parallelism over {cp_size} ranks cuts each "
                f"document into {2 * cp_size} equal chunks; pad it to a multiple of {2 * cp_size}"
            )
        chunk = (end - start) // (2 * cp_size)
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            chunks.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(chunks)


def stream_order(boundaries: Sequence[int], cp_size: int) -> torch.Tensor:
    """Return the index that puts all ranks' tokens, gathered rank after rank, back into the
    stream's order: `[t]`."""
    held = torch.cat([partition_indices(boundaries, cp_size, rank) for rank in range(cp_size)])
    return torch.argsort(held)


def document_boundaries(
    packed: PackedSeqParams, tokens: int, cp: int
) -> tuple[list[int], list[int]]:
    """Return where documents begin and end in the stream, and how many real tokens each has.

    Args:
        packed: Megatron's description of the packed batch.
        tokens: tokens of the whole stream, all context-parallel ranks together.
        cp: context-parallel ranks; with more than one of them the documents fill the stream.

    Raises:
        ValueError: queries and keys have different documents, a document has more real tokens than
            room, or the documents do not fit the stream.
    """
    sides = (
        (packed.cu_seqlens_q, packed.cu_seqlens_kv),
        (packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded),
    )
    for queries, keys in sides:
        if queries is not keys and (
            queries is None or keys is None or not torch.equal(queries, keys)
        ):
            raise ValueError(
                f"queries and keys of self-attention are in the same documents, got {queries} and {keys}"
            )
    real = packed.cu_seqlens_q.tolist()
    boundaries = real if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded.tolist()
    lengths = [end - start for start, end in itertools.pairwise(real)]
    rooms = [end - start for start, end in itertools.pairwise(boundaries)]
    if len(lengths) != len(rooms) or any(
        length > room for length, room in zip(lengths, rooms, strict=True)
    ):
        raise ValueError(f"documents of {lengths} real tokens do not fit into {rooms}")
    if boundaries[0] != 0 or boundaries[-1] > tokens or (cp > 1 and boundaries[-1] != tokens):
        raise ValueError(
            f"documents at {boundaries} in a stream of {tokens} tokens over {cp} context-parallel ranks"
        )
    return boundaries, lengths


def next_tokens(
    tensor: torch.Tensor,
    boundaries: Sequence[int],
    lengths: Sequence[int],
    cp_group: torch.distributed.ProcessGroup | None,
) -> torch.Tensor:
    """Return at each position what stands at the next one of the same document, and 0 where there
    is none.

    Args:
        tensor: ids or a mask of this rank's tokens, `[..., t / cp]`; without gradient.
        boundaries: of the documents in the stream, padding included.
        lengths: real tokens of each document; what follows them is padding, which follows nothing.
        cp_group: context-parallel group, or None.
    """
    cp = 1 if cp_group is None else cp_group.size()
    whole = tensor
    if cp > 1:
        assert cp_group is not None
        parts = [torch.empty_like(tensor) for _ in range(cp)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=cp_group)
        whole = torch.cat(parts, dim=-1).index_select(
            -1, stream_order(boundaries, cp).to(tensor.device)
        )
    has_next = torch.zeros(whole.size(-1), dtype=torch.bool)
    for start, length in zip(boundaries[:-1], lengths, strict=True):
        has_next[start : start + max(0, length - 1)] = True
    shifted = whole.roll(-1, dims=-1).masked_fill(~has_next.to(whole.device), 0)
    if cp == 1:
        return shifted
    assert cp_group is not None
    return shifted.index_select(
        -1, partition_indices(boundaries, cp, cp_group.rank()).to(whole.device)
    )


def document_padding(
    packed: PackedSeqParams,
    tokens: int,
    *,
    cp_group: torch.distributed.ProcessGroup | None,
    sp_group: torch.distributed.ProcessGroup | None,
) -> torch.Tensor:
    """Return where this rank's tokens are padding after a document, `[1, tokens]`; nothing is read
    from the device.

    Args:
        packed: Megatron's description of the packed batch, with padded boundaries.
        tokens: that this rank holds.
        cp_group: context-parallel group, which divides each document in zigzag order; None for one
            rank.
        sp_group: sequence-parallel group, which divides what is left in order; None for one rank.
    """
    cp, rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
    first = 0 if sp_group is None else tokens * sp_group.rank()
    bounds = (
        packed.cu_seqlens_q_padded // cp
    )  # of the documents, among the tokens of a context-parallel rank
    held = torch.arange(first, first + tokens, device=bounds.device, dtype=bounds.dtype)
    document = torch.searchsorted(bounds[1:], held, right=True).clamp(max=bounds.numel() - 2)
    offset = held - bounds[document]
    chunk = bounds.diff()[document] // 2
    second = (offset >= chunk).to(offset.dtype)
    number = torch.where(second == 1, 2 * cp - 1 - rank, rank)
    position = offset if cp == 1 else offset - second * chunk + number * chunk
    padding: torch.Tensor = position >= packed.cu_seqlens_q.diff()[document]
    return padding[None]
