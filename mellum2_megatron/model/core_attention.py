"""Core attention of the torch backend: grouped-query attention with a window, packed documents and
context parallelism.

Plain torch on any device, and the reference that Transformer Engine's kernels are compared with.
Megatron's own `DotProductAttention` overwrites a given mask on windowed layers
(megatron/core/fusions/fused_softmax.py:319-327, 0.19.2), repeats keys and values in memory, and
refuses packed documents and context parallelism; this one leaves the kernel to
`torch.nn.functional.scaled_dot_product_attention`.

Queries are worked through in spans: stretches of consecutive positions of one document, at most
`BLOCK` of them. A span's keys are one stretch too, from the first key its first query may see to
its last query's own, so documents need no mask, and no mask is larger than `[BLOCK, keys]`.
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

from mellum2_megatron.model.context_parallel import document_boundaries, stream_order

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.transformer_config import TransformerConfig

BLOCK = 2048
"""Queries that attend in one call."""


class TorchCoreAttention(MegatronModule):
    """Causal softmax attention over queries `[sq, b, n, d]` and grouped keys and values `[sk, b, g,
    d]`.

    Under context parallelism a rank holds two zigzag chunks of each sequence (`zigzag`). Keys and
    values are gathered from all ranks, whatever `cp_comm_type` says; their gradients are summed and
    scattered back.

    Args:
        config: the layer's configuration: `window_size` is `(keys before the query, 0)` or None.
        layer_number: 1-based layer number, unused.
        attn_mask_type: must be causal.
        attention_type: must be "self".
        attention_dropout: dropout on the attention weights; the configuration's if None.
        softmax_scale: factor on the logits; `1 / sqrt(d)` if None.
        cp_comm_type: unused.
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
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise NotImplementedError(
                f"{attention_type} attention with {attn_mask_type}: only causal self-attention"
            )
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
        """Attend.

        Args:
            query: `[sq, b, n, d]`, with `sq` this rank's share of the sequence. Without context
                parallelism query i stands at position `i + sk - sq`. Packed: `[t, n, d]`.
            key, value: `[sk, b, g, d]`, g divides n. Packed: `[t, g, d]`.
            attention_mask: `[b or 1, 1, sq, keys]`, true where attention is forbidden, *in
                addition* to causality and the window; keys in the order of the whole sequence. None
                if packed.
            packed_seq_params: THD format: document i occupies `cu_seqlens_q_padded[i] ... [i + 1]`
                of the stream, and its first `cu_seqlens_q[i + 1] - cu_seqlens_q[i]` tokens are
                real. The rest is padding: it attends to nothing, its output is 0 and it has no
                gradient.

        Returns:
            `[sq, b, n * d]`, or `[t, n * d]` if packed.

        Raises:
            NotImplementedError: an attention bias, a mask beside packed documents, or a
                context-parallel group that changes with the batch.
            ValueError: document boundaries that contradict each other, the tokens or context
                parallelism.
        """
        if attention_bias is not None:
            raise NotImplementedError("the torch backend takes no attention bias")
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        cp = 1 if self.cp_group is None else self.cp_group.size()
        if packed:
            assert packed_seq_params is not None
            if attention_mask is not None or packed_seq_params.local_cp_size is not None:
                raise NotImplementedError(
                    "packed documents go without attention mask and with a fixed context group"
                )
            boundaries, lengths = document_boundaries(packed_seq_params, query.size(0) * cp, cp)
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        else:
            boundaries = [0, key.size(0) * cp]
            lengths = boundaries[1:]
        if self.cp_group is not None and cp > 1:
            key, value = self._whole_sequence(key, value, boundaries, cp)
            spans = zigzag_spans(boundaries, lengths, cp, self.cp_group.rank())
        elif packed:
            spans = document_spans(boundaries, lengths)
        else:
            spans = split(
                Span(row=0, size=query.size(0), position=key.size(0) - query.size(0), document=0)
            )
        output = self._attend(query, key, value, attention_mask, spans)
        return output.squeeze(1) if packed else output

    def _whole_sequence(
        self, key: torch.Tensor, value: torch.Tensor, boundaries: Sequence[int], cp: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all ranks' keys and values in the stream's order, `[s, b, g, d]` each; one
        collective for both."""
        gathered = gather_from_sequence_parallel_region(
            torch.cat((key, value), dim=-1), group=self.cp_group
        )
        ordered = gathered.index_select(0, stream_order(boundaries, cp).to(gathered.device))
        whole_key, whole_value = ordered.split((key.size(-1), value.size(-1)), dim=-1)
        return whole_key, whole_value

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        spans: Iterator[Span],
    ) -> torch.Tensor:
        """Return the attention of each span over its stretch of keys, `[sq, b, n * d]`; rows of no
        span are 0."""
        rows, batch = query.size(0), query.size(1)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        pieces = []
        done = 0
        for span in spans:
            first = 0 if self.window is None else max(0, span.position - self.window + 1)
            keys = slice(span.document + first, span.document + span.position + span.size)
            count = keys.stop - keys.start
            visible: torch.Tensor | None = None
            if (
                attention_mask is not None
                or span.size != count
                or (self.window is not None and self.window < count)
            ):
                visible = causal_window_mask(span.size, count, self.window, query.device)
                if attention_mask is not None:
                    visible = visible & ~attention_mask[:, :, span.row : span.row + span.size, keys]
            context = torch.nn.functional.scaled_dot_product_attention(
                q[:, :, span.row : span.row + span.size],
                k[:, :, keys],
                v[:, :, keys],
                attn_mask=visible,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=visible is None,
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            if span.row > done:
                pieces.append(q.new_zeros(span.row - done, batch, query.size(2) * query.size(3)))
            pieces.append(context.permute(2, 0, 1, 3).reshape(span.size, batch, -1))
            done = span.row + span.size
        if done < rows:
            pieces.append(q.new_zeros(rows - done, batch, query.size(2) * query.size(3)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Consecutive queries of one document.

    Attributes:
        row: where they start among this rank's queries.
        size: their number.
        position: where the first of them stands in its document.
        document: where the document starts among the keys.
    """

    row: int
    size: int
    position: int
    document: int


def split(span: Span) -> Iterator[Span]:
    """Yield a span in pieces of at most `BLOCK` queries."""
    for start in range(0, span.size, BLOCK):
        size = min(BLOCK, span.size - start)
        yield Span(
            row=span.row + start, size=size, position=span.position + start, document=span.document
        )


def document_spans(boundaries: Sequence[int], lengths: Sequence[int]) -> Iterator[Span]:
    """Yield the spans of whole documents; arguments as `zigzag.document_boundaries` returns
    them."""
    for start, length in zip(boundaries[:-1], lengths, strict=True):
        yield from split(Span(row=start, size=length, position=0, document=start))


def zigzag_spans(
    boundaries: Sequence[int], lengths: Sequence[int], cp: int, rank: int
) -> Iterator[Span]:
    """Yield the spans of a rank's two chunks of every document, padding left out."""
    for (start, end), length in zip(itertools.pairwise(boundaries), lengths, strict=True):
        chunk = (end - start) // (2 * cp)
        for half, number in enumerate((rank, 2 * cp - 1 - rank)):
            position = number * chunk
            real = min(chunk, length - position)
            if real > 0:
                yield from split(
                    Span(
                        row=start // cp + half * chunk, size=real, position=position, document=start
                    )
                )


def causal_window_mask(sq: int, sk: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which keys each query sees: `[sq, sk]`, true iff `0 <= position(query) - position(key)
    < window`.

    The queries are the last `sq` of `sk` positions. `window` counts the query itself (report §2),
    None means no limit.
    """
    distance = (
        torch.arange(sk - sq, sk, device=device)[:, None] - torch.arange(sk, device=device)[None, :]
    )
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    return visible
