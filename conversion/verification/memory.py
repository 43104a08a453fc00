"""Memory that scoring needs, in transformers and on a Megatron rank, compared with what is free."""

from __future__ import annotations

import math

from conversion.huggingface.format import torch_dtype
from conversion.verification.ranks import Ranks
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import size_text
from mellum2_megatron.common.free_memory import free_memory
from mellum2_megatron.config import Backend
from mellum2_megatron.planning.rank_weights import local_weights

_PAIR_BYTES = 6
"""Bytes for each pair of positions of a sequence: two masks of truth values and one in float32
(transformers 5.23, CPU attention of torch 2.15). Measured at 16,384 tokens: 5.9 to 6.0."""

_LOGIT_COPIES = 3
"""Copies of a sequence's logits that exist at once: of the head, in float32, and of the loss."""


def require_huggingface_memory(
    name: str, architecture: Mellum2Architecture, length: int, *, free: int | None = None
) -> None:
    """Check that transformers can hold a whole model in float32, and one sequence's logits.

    Args:
        name: the folder, for the message.
        architecture: the model.
        length: tokens of a sequence.
        free: free memory in bytes, default `free_memory`.

    Raises:
        InputError: it cannot.
    """
    weights = 4 * sum(math.prod(parameter.shape) for parameter in architecture.parameters())
    heads = 1 + architecture.num_mtp_layers
    logits = 4 * _LOGIT_COPIES * heads * length * architecture.vocab_size
    _require(
        f"{name} in transformers, sequences of {length} tokens",
        weights,
        logits,
        free_memory() if free is None else free,
        fix="use a machine with more memory, or shorter sequences (--tokens)",
    )


def require_long_text_memory(
    name: str, architecture: Mellum2Architecture, length: int, *, free: int | None = None
) -> None:
    """Check that transformers can hold a whole model in float32, and read a text at once.

    Its logits are taken in parts.

    Args:
        name: the folder, for the message.
        architecture: the model.
        length: tokens of the longest text.
        free: free memory in bytes, default `free_memory`.

    Raises:
        InputError: it cannot.
    """
    weights = 4 * sum(math.prod(parameter.shape) for parameter in architecture.parameters())
    _require(
        f"{name} in transformers, texts of {length:,} tokens",
        weights,
        _PAIR_BYTES * length**2,
        free_memory() if free is None else free,
        fix="use a machine with more memory, or shorter texts, such as needle.lengths=[16384] "
        "and position_loss.length=16384",
        of="for attention",
    )


def require_rank_memory(
    architecture: Mellum2Architecture,
    ranks: Ranks,
    length: int,
    *,
    backend: Backend = "torch",
    free: int,
) -> None:
    """Check that a rank can hold its part of the weights, and of one sequence's logits.

    Args:
        architecture: the model.
        ranks: the processes.
        length: tokens of a sequence.
        backend: backend of the modules, default "torch".
        free: memory in bytes that one rank may take.

    Raises:
        InputError: it cannot.
    """
    layout, itemsize = ranks.layout, torch_dtype(ranks.dtype).itemsize
    weights = itemsize * max(
        sum(weight.numel for weight in local_weights(architecture, layout, backend, stage=stage))
        for stage in range(layout.pp)
    )
    # The heads run one after the other, and each logit is written and dropped.
    part = ranks.padded(length) // layout.cp * (architecture.vocab_size // layout.tp)
    ways = f"--tp {2 * layout.tp}, --pp {2 * layout.pp} or --ep {2 * layout.ep}"
    _require(
        f"the fullest rank of {ranks.count}, sequences of {length} tokens",
        weights,
        4 * _LOGIT_COPIES * part,
        free,
        fix=f"divide the model among more ranks ({ways}), or shorten the sequences (--tokens)",
    )


def _require(
    what: str, weights: int, more: int, free: int, *, fix: str, of: str = "of logits"
) -> None:
    if weights + more > free:
        raise InputError(
            f"{what}: {size_text(weights)} of weights and {size_text(more)} {of}",
            rule=f"{size_text(free)} of memory are free",
            fix=fix,
        )
