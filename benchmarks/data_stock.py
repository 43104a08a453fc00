"""Megatron's GPTDataset over the documents of packs, for `benchmarks.data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mellum2_megatron.data.feed.sources import DatasetTokenizer
from mellum2_megatron.data.tokens.pack_files import PackShard


def write_documents(prefix: Path, packs: PackShard) -> None:
    """Write the pieces of packs as documents of one of Megatron's indexed datasets."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for pack in range(len(packs)):
        tokens = packs.tokens(pack).astype(np.int32)
        starts, lengths = packs.bounds(pack)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            builder.add_document(tokens[start : start + length], [length])
    builder.finalize(f"{prefix}.idx")


def stock_dataset(prefix: Path, length: int, *, documents: bool) -> Any:
    """Return Megatron's dataset over an indexed dataset, in one epoch.

    Args:
        prefix: the indexed dataset, without suffix.
        length: tokens of a sample.
        documents: describe the documents of a sample (``inter_document_masking``), as packs do.
            Otherwise all samples share one mask and its positions.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend_per_split=[([str(prefix)], None), None, None],
        path_to_cache=f"{prefix}-{documents}",
        tokenizer=DatasetTokenizer(vocab_size=98_304, eod=1, eos=1, bos=0),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        inter_document_masking=documents,
    )
    indexed = IndexedDataset(str(prefix))
    return GPTDataset(
        indexed,
        str(prefix),
        np.arange(len(indexed.sequence_lengths), dtype=np.int32),
        None,
        Split.train,
        config,
    )
