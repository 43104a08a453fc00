"""Division of sequences among context-parallel ranks, in plain torch.

A late query of causal attention sees more keys than an early one. To give every rank the same work,
a sequence is cut into `2 * cp` equal chunks, and rank `r` holds chunks `r` and `2 * cp - 1 - r`, in
that order (zigzag). Packed documents are divided one by one in the same way. This is the layout of
Megatron (megatron/core/utils.py:2386 and 2452, 0.19.2) and of Transformer Engine.

A *stream* is a sequence, or the packed documents one after the other. Boundaries are cumulative
lengths `(0, end of document 0, end of document 1, ...)`; a sequence that is not packed is one
document. The letters of shapes are in `mellum2_megatron/model/__init__.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


def partition_indices(boundaries: Sequence[int], cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return the positions in the stream of the tokens that a rank holds, in its order: `[t / cp]`.

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
                f"a document of {end - start} tokens at {start}: context parallelism over "
                f"{cp_size} ranks cuts each document into {2 * cp_size} equal chunks; "
                f"pad it to a multiple of {2 * cp_size}"
            )
        chunk = (end - start) // (2 * cp_size)
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            chunks.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(chunks)


def chunk_order(boundaries: Sequence[int], cp_size: int) -> torch.Tensor:
    """Return the index that restores the stream from all ranks' tokens, rank after rank: `[t]`."""
    held = torch.cat([partition_indices(boundaries, cp_size, rank) for rank in range(cp_size)])
    return torch.argsort(held)


def document_boundaries(
    packed: PackedSeqParams, tokens: int, cp: int
) -> tuple[list[int], list[int]]:
    """Return the documents' boundaries in the stream, and the number of real tokens of each.

    Args:
        packed: Megatron's description of the packed batch.
        tokens: tokens of the stream, all context-parallel ranks together.
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
                "queries and keys of self-attention are in the same documents, "
                f"got {queries} and {keys}"
            )
    real = packed.cu_seqlens_q.tolist()
    boundaries = real if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded.tolist()
    lengths = [end - start for start, end in itertools.pairwise(real)]
    rooms = [end - start for start, end in itertools.pairwise(boundaries)]
    if len(lengths) != len(rooms) or any(
        length > room for length, room in zip(lengths, rooms, strict=True)
    ):
        raise ValueError(f"documents of {lengths} real tokens do not fit into {rooms}")
    # Tokens after the last document belong to no chunk, so several ranks could not share them.
    if boundaries[0] != 0 or boundaries[-1] > tokens or (cp > 1 and boundaries[-1] != tokens):
        raise ValueError(
            f"documents at {boundaries} in a stream of {tokens} tokens "
            f"over {cp} context-parallel ranks"
        )
    return boundaries, lengths


def next_tokens(
    tensor: torch.Tensor,
    boundaries: Sequence[int],
    lengths: Sequence[int],
    cp_group: torch.distributed.ProcessGroup | None,
) -> torch.Tensor:
    """Return, at each position, the value at the next position of the same document, or 0.

    Args:
        tensor: ids or a mask of this rank's tokens, `[..., t / cp]`; without gradient.
        boundaries: document boundaries in the stream, padding included.
        lengths: real tokens of each document; the last of them, and padding, get 0.
        cp_group: context-parallel group, or None for one rank.

    Returns:
        `[..., t / cp]`, in the order of `tensor`.
    """
    cp = 1 if cp_group is None else cp_group.size()
    stream = tensor
    if cp > 1:
        assert cp_group is not None
        # The next token of a chunk's last one is on another rank.
        parts = [torch.empty_like(tensor) for _ in range(cp)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=cp_group)
        order = chunk_order(boundaries, cp).to(tensor.device)
        stream = torch.cat(parts, dim=-1).index_select(-1, order)
    has_next_t = torch.zeros(stream.size(-1), dtype=torch.bool)
    for start, length in zip(boundaries[:-1], lengths, strict=True):
        has_next_t[start : start + max(0, length - 1)] = True
    shifted = stream.roll(-1, dims=-1).masked_fill(~has_next_t.to(stream.device), 0)
    if cp == 1:
        return shifted
    assert cp_group is not None
    held = partition_indices(boundaries, cp, cp_group.rank()).to(stream.device)
    return shifted.index_select(-1, held)


def document_padding(
    packed: PackedSeqParams,
    tokens: int,
    *,
    cp_group: torch.distributed.ProcessGroup | None,
    sp_group: torch.distributed.ProcessGroup | None,
) -> torch.Tensor:
    """Return `[1, tokens]`, true where this rank's token is padding after a document.

    Computed on the device: a copy of the boundaries to the host would stall it in every layer.

    Args:
        packed: Megatron's description of the packed batch, with padded boundaries.
        tokens: number of tokens of this rank, `t / cp / sp`.
        cp_group: context-parallel group, which divides each document in zigzag order; None for one
            rank.
        sp_group: sequence-parallel group, which divides a context-parallel rank's tokens in order;
            None for one rank.
    """
    cp, rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
    first = 0 if sp_group is None else tokens * sp_group.rank()
    # Boundaries among the tokens of one context-parallel rank: it holds 1 / cp of each document.
    boundaries = packed.cu_seqlens_q_padded // cp
    index_t = torch.arange(first, first + tokens, device=boundaries.device, dtype=boundaries.dtype)
    # Tokens after the last document lie beyond its real ones: they count as its padding.
    last = boundaries.numel() - 2
    document_t = torch.searchsorted(boundaries[1:], index_t, right=True).clamp(max=last)
    offset_t = index_t - boundaries[document_t]
    # A rank's two chunks of a document lie side by side, but belong to different positions.
    chunk_t = boundaries.diff()[document_t] // 2
    in_second_t = (offset_t >= chunk_t).to(offset_t.dtype)
    chunk_number_t = torch.where(in_second_t == 1, 2 * cp - 1 - rank, rank)
    position_t = (
        offset_t if cp == 1 else offset_t - in_second_t * chunk_t + chunk_number_t * chunk_t
    )
    padding_t: torch.Tensor = position_t >= packed.cu_seqlens_q.diff()[document_t]
    return padding_t[None]
