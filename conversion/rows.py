"""A row of the mapping table, and the relations between the tensors of its two sides.

Shape letters are explained in `conversion.mapping`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from mellum2_megatron.architecture import Mellum2Architecture


class Transform(Protocol):
    """The relation of an entry's Hugging Face tensors to one Megatron slice; no value changes."""

    def join(self, parts: list[Tensor], architecture: Mellum2Architecture) -> Tensor:
        """Return the Megatron slice made of ``parts``, which stand in the row's order."""
        ...

    def split(self, tensor: Tensor, architecture: Mellum2Architecture) -> list[Tensor]:
        """Return the Hugging Face tensors of a Megatron slice, in the row's order."""
        ...


class Same:
    """One tensor, the same on both sides."""

    def join(self, parts: list[Tensor], architecture: Mellum2Architecture) -> Tensor:
        """Return the only part itself: callers rely on it to save a copy and a hash."""
        return parts[0]

    def split(self, tensor: Tensor, architecture: Mellum2Architecture) -> list[Tensor]:
        """Return the tensor itself: callers rely on it to save a copy and a hash."""
        return [tensor]


class GroupedHeads:
    """q [Q, H], k [K, H], v [K, H] <-> linear_qkv [Q + 2K, H].

    Megatron's rows follow the key/value groups: the query heads of a group, its key head, its
    value head, then the next group (``megatron/core/transformer/attention.py``,
    ``get_query_key_value_tensors``, 0.19.2). Hugging Face has all query heads in ``q_proj``, all
    key heads in ``k_proj``, all value heads in ``v_proj``.
    """

    def join(self, parts: list[Tensor], architecture: Mellum2Architecture) -> Tensor:
        """Interleave q [Q, H], k [K, H] and v [K, H] by group; return a new [Q + 2K, H]."""
        import torch

        groups, hidden = architecture.num_key_value_heads, architecture.hidden_size
        # Shape of each: [groups, rows of the group, H].
        by_group = [part.reshape(groups, -1, hidden) for part in parts]
        return torch.cat(by_group, dim=1).reshape(-1, hidden)

    def split(self, tensor: Tensor, architecture: Mellum2Architecture) -> list[Tensor]:
        """Return q [Q, H], k [K, H] and v [K, H], the inverse of `join`."""
        import torch

        groups, hidden = architecture.num_key_value_heads, architecture.hidden_size
        head = architecture.head_dim
        queries = architecture.num_attention_heads // groups * head
        by_group = tensor.reshape(groups, queries + 2 * head, hidden)
        parts = torch.split(by_group, [queries, head, head], dim=1)
        return [part.reshape(-1, hidden) for part in parts]


class StackedRows:
    """gate [F, H], up [F, H] <-> linear_fc1 [2F, H].

    Gate comes first: Megatron's gated unit is ``act(first half) * second half``
    (``megatron/core/transformer/mlp.py``, 0.19.2).
    """

    def join(self, parts: list[Tensor], architecture: Mellum2Architecture) -> Tensor:
        """Return a new [2F, H]: the rows of gate [F, H], then those of up [F, H]."""
        import torch

        return torch.cat(parts, dim=0)

    def split(self, tensor: Tensor, architecture: Mellum2Architecture) -> list[Tensor]:
        """Return gate [F, H] and up [F, H], views of ``tensor`` [2F, H]."""
        return list(tensor.chunk(2, dim=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kind of weight.

    Attributes:
        megatron: Megatron key without the prefix of its place (see `PLACES`).
        shape: shape letters of one Megatron slice, that is of one layer and one expert.
        huggingface: (name without the place's prefix, shape letters) of each Hugging Face tensor,
            in the transform's order.
        transform: relation of the two sides.
    """

    megatron: str
    shape: str
    huggingface: tuple[tuple[str, str], ...]
    transform: Transform

    @property
    def per_expert(self) -> bool:
        """True if the Megatron tensor has an expert axis."""
        return "{expert}" in self.huggingface[0][0]

    @property
    def padded_vocabulary(self) -> bool:
        """True if Megatron may pad the vocabulary's rows.

        It pads to a multiple of ``--make-vocab-size-divisible-by`` times the tensor-parallel size.
        """
        return self.shape.startswith("V")


def weight_row(
    megatron: str, shape: str, *huggingface: tuple[str, str], transform: Transform | None = None
) -> Row:
    return Row(
        megatron=megatron, shape=shape, huggingface=huggingface, transform=transform or Same()
    )
