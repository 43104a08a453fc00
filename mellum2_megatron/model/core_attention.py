"""Core attention of the torch backend: grouped queries, sliding window, packed documents and
context parallelism.

Plain torch on any device, and the reference that Transformer Engine's kernels are compared with.
Megatron's own `DotProductAttention` overwrites a given mask on windowed layers
(megatron/core/fusions/fused_softmax.py:319-327, 0.19.2), repeats keys and values in memory, and
refuses packed documents and context parallelism. Here the kernel is
`torch.nn.functional.scaled_dot_product_attention`.

A rank's queries are cut into spans: consecutive positions of one document, at most `BLOCK` of them
and at most the layer's window, since the kernel computes hidden pairs too.
The keys of a span are consecutive too, from the first key that its first query may see to the
position of its last query. Documents therefore need no mask, and a mask never exceeds
`[BLOCK, j]`. The letters of shapes are in `mellum2_megatron/model/__init__.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from mellum2_megatron.model.context_parallel import chunk_order, document_boundaries

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.transformer_config import TransformerConfig

BLOCK = 2048
"""Largest number of queries in one call of the kernel; bounds the memory of its mask."""
_LEAST_BLOCK = 64
"""A layer's window shortens its blocks down to this many queries; below it, calls cost more."""


class TorchCoreAttention(MegatronModule):
    """Causal softmax attention of queries `[s, b, n, d]` over keys and values `[s, b, g, d]`.

    Under context parallelism a rank holds two zigzag chunks of each sequence (`context_parallel`).
    Keys and values are gathered from all ranks, whatever `cp_comm_type` is; their gradients are
    summed and scattered back.

    Args:
        config: the layer's configuration; `window_size` is `(keys before the query, 0)` or None.
        layer_number: 1-based layer number, unused.
        attn_mask_type: must be causal.
        attention_type: must be "self".
        attention_dropout: dropout on the attention weights; the configuration's if None.
        softmax_scale: factor on the logits; `1 / sqrt(d)` if None.
        cp_comm_type, k_channels, v_channels: unused.
        pg_collection: process groups, of which `cp` is read; Megatron's global ones if None.

    Raises:
        NotImplementedError: a mask type other than causal, or attention other than self-attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise NotImplementedError(
                f"{attention_type} attention with {attn_mask_type}: only causal self-attention"
            )
        # Megatron counts the keys before the query, report §2 counts the query's own too.
        window_size = config.window_size
        self.window = None if window_size is None else window_size[0] + 1
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group: torch.distributed.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            self.cp_group = (
                parallel_state.get_context_parallel_group()
                if pg_collection is None
                else pg_collection.cp
            )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Compute the attention of this rank's queries.

        Args:
            query: `[s / cp, b, n, d]`; packed: `[t / cp, n, d]`. Without packing and context
                parallelism there may be fewer queries than keys: those of the last positions.
            key, value: `[s / cp, b, g, d]`, g divides n; packed: `[t / cp, g, d]`. Values may have
                another width, which the output then has.
            attention_mask: `[b or 1, 1, s / cp, s]`, true where attention is forbidden, *in
                addition* to causality and the window; keys in the order of the undivided sequence.
                None if packed.
            packed_seq_params: THD format. Document i occupies `cu_seqlens_q_padded[i] ... [i + 1]`
                of the stream, and its first `cu_seqlens_q[i + 1] - cu_seqlens_q[i]` tokens are
                real. The rest is padding: it attends to nothing, its output is 0 and it has no
                gradient.

        Returns:
            `[s / cp, b, n * d]`, or `[t / cp, n * d]` if packed.

        Raises:
            NotImplementedError: an attention bias, a mask beside packed documents, or a
                context-parallel group that changes with the batch.
            ValueError: document boundaries that contradict each other, the tokens or context
                parallelism.
        """
        if attention_bias is not None:
            raise NotImplementedError("the torch backend takes no attention bias")
        cp, rank = (1, 0) if self.cp_group is None else (self.cp_group.size(), self.cp_group.rank())
        thd = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        documents = packed_seq_params if thd else None
        if documents is not None:
            if attention_mask is not None or documents.local_cp_size is not None:
                raise NotImplementedError(
                    "packed documents take no attention mask and need a fixed context-parallel "
                    "group"
                )
            boundaries, lengths = document_boundaries(documents, query.size(0) * cp, cp)
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        else:
            boundaries, lengths = [0, key.size(0) * cp], [key.size(0) * cp]
        if self.cp_group is not None and cp > 1:
            key, value = _gather_keys_and_values(key, value, boundaries, self.cp_group)
        spans: Iterator[Span | Gap]
        if documents is not None or cp > 1:
            spans = document_spans(boundaries, lengths, query.size(0), cp, rank, window=self.window)
        else:
            sequence = Span(
                query_start=0,
                size=query.size(0),
                # A generation's cache holds keys of earlier positions, without their queries.
                position_in_document=key.size(0) - query.size(0),
                document_start=0,
            )
            spans = split_into_blocks(sequence, self.window)

        # torch's CPU kernel needs 1.8 times as long for BF16 as for FP32 (forward and backward,
        # 256 tokens, torch 2.15), so on a CPU halves are widened first; the result is rounded once.
        dtype = query.dtype
        if query.device.type == "cpu" and dtype.itemsize == 2:
            query, key, value = query.float(), key.float(), value.float()
        # The kernel wants heads before positions; these are views.
        query_bnsd, key_bgsd, value_bgsd = (
            tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)
        )
        pieces = [
            query.new_zeros(span.size, query.size(1), query.size(2) * value.size(3))
            if isinstance(span, Gap)
            else self._attend(query_bnsd, key_bgsd, value_bgsd, attention_mask, span)
            for span in spans
        ]
        if torch.is_grad_enabled() and not any(piece.requires_grad for piece in pieces):
            # A rank without a real token has a backward pass all the same, with the reduce-scatter
            # of its keys: the other ranks would wait for it forever.
            nothing = torch.cat([tensor.flatten()[:0] for tensor in (query, key, value)])
            pieces.append(nothing.view(0, *pieces[0].shape[1:]))
        output = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(dtype)
        return output if documents is None else output.squeeze(1)

    def _attend(
        self,
        query_bnsd: torch.Tensor,
        key_bgsd: torch.Tensor,
        value_bgsd: torch.Tensor,
        mask_b1ss: torch.Tensor | None,
        span: Span,
    ) -> torch.Tensor:
        """Return the attention of one span over its keys, `[i, b, n * d]`."""
        queries, keys = span.queries(), span.keys(self.window)
        count = keys.stop - keys.start
        visible: torch.Tensor | None = None
        # Without a mask the kernel may take its fast causal path. That path aligns queries and
        # keys at their first positions, so it is right only for equally many of both.
        if (
            mask_b1ss is not None
            or span.size != count
            or (self.window is not None and self.window < count)
        ):
            visible = causal_window_mask(span.size, count, self.window, query_bnsd.device)
            if mask_b1ss is not None:
                visible = visible & ~mask_b1ss[:, :, queries, keys]
        output_bnid = torch.nn.functional.scaled_dot_product_attention(
            query_bnsd[:, :, queries],
            key_bgsd[:, :, keys],
            value_bgsd[:, :, keys],
            attn_mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=visible is None,
            scale=self.softmax_scale,
            enable_gqa=True,  # the kernel shares a group's keys instead of repeating them
        )
        return output_bnid.permute(2, 0, 1, 3).reshape(span.size, query_bnsd.size(0), -1)


def _gather_keys_and_values(
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: Sequence[int],
    group: torch.distributed.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all ranks' keys and values in the order of the stream.

    Args:
        key, value: keys and values of this rank's tokens, `[s / cp, b, g, d]`.
        boundaries: document boundaries in the stream.
        group: context-parallel group.

    Returns:
        Keys and values, `[s, b, g, d]` each.
    """
    # One collective for both. Despite its name it gathers over any group, and its backward pass
    # is the reduce-scatter that keys seen by several ranks need
    # (megatron/core/tensor_parallel/mappings.py:522, 0.19.2).
    gathered = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=group)
    order = chunk_order(boundaries, group.size()).to(gathered.device)
    all_keys, all_values = gathered.index_select(0, order).split(
        (key.size(-1), value.size(-1)), dim=-1
    )
    return all_keys, all_values


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Consecutive queries of one document.

    Attributes:
        query_start: index of the first query among this rank's queries.
        size: number of queries.
        position_in_document: position of the first query in its document.
        document_start: index of the document's first token among the keys.
    """

    query_start: int
    size: int
    position_in_document: int
    document_start: int

    def queries(self) -> slice:
        """Return the slice of this rank's queries that the span covers."""
        return slice(self.query_start, self.query_start + self.size)

    def keys(self, window: int | None) -> slice:
        """Return the slice of keys that the queries may see, all of the span's own document."""
        first = 0 if window is None else max(0, self.position_in_document - window + 1)
        end = self.position_in_document + self.size
        return slice(self.document_start + first, self.document_start + end)


@dataclass(frozen=True, slots=True)
class Gap:
    """Consecutive queries that attend to nothing, because they are padding.

    Attributes:
        size: number of queries.
    """

    size: int


def split_into_blocks(span: Span, window: int | None) -> Iterator[Span]:
    """Yield a span in pieces of at most `BLOCK` queries, and hardly more than the window.

    Two queries that are a window apart share no key, so a longer piece is mostly hidden pairs.
    """
    most = BLOCK if window is None else min(BLOCK, max(window, _LEAST_BLOCK))
    for start in range(0, span.size, most):
        yield Span(
            query_start=span.query_start + start,
            size=min(most, span.size - start),
            position_in_document=span.position_in_document + start,
            document_start=span.document_start,
        )


def document_spans(
    boundaries: Sequence[int],
    lengths: Sequence[int],
    tokens: int,
    cp: int,
    rank: int,
    *,
    window: int | None,
) -> Iterator[Span | Gap]:
    """Yield the spans of a rank's queries in order, and the gaps that fill the rest.

    Args:
        boundaries: document boundaries in the stream, from `context_parallel.document_boundaries`.
        lengths: real tokens of each document, from the same function.
        tokens: number of this rank's queries.
        cp: context-parallel ranks.
        rank: this rank among them.
        window: keys that a query sees, its own included; None for all before it.
    """
    # A single rank takes each document as one chunk: two halves would double the kernel calls.
    chunks, numbers = (1, (0,)) if cp == 1 else (2 * cp, (rank, 2 * cp - 1 - rank))
    query_start = 0
    for (start, end), length in zip(itertools.pairwise(boundaries), lengths, strict=True):
        chunk = (end - start) // chunks
        for number in numbers:
            real = min(chunk, max(0, length - number * chunk))
            yield from split_into_blocks(
                Span(
                    query_start=query_start,
                    size=real,
                    position_in_document=number * chunk,
                    document_start=start,
                ),
                window,
            )
            if real < chunk:
                yield Gap(chunk - real)
            query_start += chunk
    # Without context parallelism the stream may end in tokens of no document.
    if query_start < tokens:
        yield Gap(tokens - query_start)


def causal_window_mask(
    queries: int, keys: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """Return `[i, j]`, true iff `0 <= position(query) - position(key) < window`.

    Args:
        queries: number of queries; they are the last of the positions.
        keys: number of positions.
        window: keys that a query sees, its own included (report §2); None for all before it.
        device: device of the result.
    """
    position_i = torch.arange(keys - queries, keys, device=device)
    position_j = torch.arange(keys, device=device)
    distance_ij = position_i[:, None] - position_j[None, :]
    visible_ij = distance_ij >= 0
    if window is not None:
        visible_ij &= distance_ij < window
    return visible_ij
