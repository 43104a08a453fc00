"""Rows to samples in worker processes; the result is the same for any number of them.

Workers import neither torch nor megatron.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.common.ordered_pool import map_in_order
from mellum2_megatron.data.chat.reading import ChatRow
from mellum2_megatron.data.chat.records import RecordError, parse_record
from mellum2_megatron.data.chat.samples import Sample, SampleMaker, conversation_hash
from mellum2_megatron.data.chat.template import ChatTemplate, Mode
from mellum2_megatron.data.corpus.rows import BadRow

_ROWS = 64

# Set once in each process: sending tokenizer and template with every batch would cost more.
_maker: SampleMaker | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """A row's samples, or its fault.

    Attributes:
        source: number of its input.
        place: file and line, for messages.
        fault: reason why it cannot be used; default None.
        conversation: hash of the conversation's content; default 0.
        samples: samples; none for a conversation that the mode leaves out. Default none.
    """

    source: int
    place: str
    fault: str | None = None
    conversation: int = 0
    samples: tuple[Sample, ...] = ()


def encode_rows(
    rows: Iterable[ChatRow], *, tokenizer: Path, template: ChatTemplate, mode: Mode, workers: int
) -> Iterator[EncodedRow]:
    """Encode rows in order.

    Args:
        rows: the rows; they are taken as they are needed.
        tokenizer, template, mode: see `SampleMaker`.
        workers: number of processes; 1 encodes in this process.

    Raises:
        WorkError: a worker was killed.
    """
    batches = itertools.batched(rows, _ROWS)
    if workers == 1:
        maker = SampleMaker(tokenizer, template, mode)
        yield from (encode_row(maker, row) for batch in batches for row in batch)
        return
    for encoded in map_in_order(
        _encode_batch,
        batches,
        workers=workers,
        initialise=_initialise_worker,
        arguments=(tokenizer, template, mode),
        worker="a worker",
    ):
        yield from encoded


def encode_row(maker: SampleMaker, row: ChatRow) -> EncodedRow:
    """Return a row's samples or its fault."""
    fault: str
    if isinstance(row.content, BadRow):
        fault = row.content.why
    else:
        try:
            conversation = parse_record(row.content, nulls_are_absent=row.parquet)
            return EncodedRow(
                source=row.source,
                place=row.place,
                conversation=conversation_hash(conversation),
                samples=tuple(maker.samples(conversation)),
            )
        except RecordError as error:
            fault = str(error)
    return EncodedRow(source=row.source, place=row.place, fault=fault)


def _initialise_worker(tokenizer: Path, template: ChatTemplate, mode: Mode) -> None:
    global _maker
    # The processes are the parallelism; and without torch transformers loads in a second.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "USE_TORCH": "0"}
    _maker = SampleMaker(tokenizer, template, mode)


def _encode_batch(rows: Sequence[ChatRow]) -> list[EncodedRow]:
    assert _maker is not None
    return [encode_row(_maker, row) for row in rows]
