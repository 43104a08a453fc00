"""Megatron's description of packed documents, for the tests that make their own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch


def packed_documents(lengths: Sequence[int], rooms: Sequence[int], device: Any = "cpu") -> Any:
    """Return Megatron's `PackedSeqParams` in THD format.

    Args:
        lengths: real tokens of each document.
        rooms: positions of each document in the stream, padding included.
        device: device of the boundaries.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    real, padded = (
        torch.tensor(list(itertools.accumulate(sizes, initial=0)), dtype=torch.int32, device=device)
        for sizes in (lengths, rooms)
    )
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max(rooms),
        max_seqlen_kv=max(rooms),
    )
