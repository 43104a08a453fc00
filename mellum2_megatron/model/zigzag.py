"""How context parallelism divides sequences, in plain torch.

A late query of causal attention sees more keys than an early one. To give every rank the same work, a sequence is cut
into `2 * cp` equal chunks and rank `r` holds chunks `r` and `2 * cp - 1 - r`, in that order. Packed documents are
divided one by one in the same way. This is the layout of Megatron (megatron/core/utils.py:2386 and 2452, 0.19.2) and of
Transformer Engine.

Boundaries are cumulative lengths `(0, end of document 0, end of document 1, ...)`; a sequence that is not packed is one
document.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def partition_indices(boundaries: Sequence[int], cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return the positions, in the whole stream, of the tokens that a rank holds, in the rank's order: `[t / cp]`.

    The same as Transformer Engine's `thd_get_partitioned_indices`, which has no CPU version.

    Raises:
        ValueError: a document's length is not a multiple of `2 * cp_size`.
    """
    if cp_size == 1:
        return torch.arange(boundaries[-1])
    chunks = []
    for start, end in zip(boundaries, boundaries[1:], strict=False):
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
    """Return the index that puts all ranks' tokens, gathered rank after rank, back into the stream's order: `[t]`."""
    held = torch.cat([partition_indices(boundaries, cp_size, rank) for rank in range(cp_size)])
    return torch.argsort(held)
