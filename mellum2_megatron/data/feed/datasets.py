"""The datasets of a run, for ``megatron.training.pretrain``.

A source of packs is read by `PackedDataset`. Any other is one of Megatron's own GPT datasets: a
sample is ``sequence_length + 1`` tokens of the shuffled documents, one after the other. A blend
names the source of each sample by a rule (`feed.order`), so it has no index files.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mellum2_megatron.common.files import size_text
from mellum2_megatron.data.corpus.selection import Split
from mellum2_megatron.data.feed.blend import Blend
from mellum2_megatron.data.feed.index_plan import (
    LARGE,
    SampleIndex,
    blend_of,
    index_of,
    seed_of,
    source_counts,
)
from mellum2_megatron.data.feed.order import key_of
from mellum2_megatron.data.feed.packed_dataset import PackedDataset
from mellum2_megatron.data.feed.sources import RunData, Source, check_data

if TYPE_CHECKING:
    from mellum2_megatron.config import Run
    from mellum2_megatron.data.feed.indexed_documents import IndexedDocuments


logger = logging.getLogger(__name__)


def build_datasets(
    run: Run,
    train_val_test_num_samples: Sequence[int | None],
    *,
    vp_stage: int | None = None,
    is_built_on_rank: Callable[[], bool] | None = None,
    cache: Path | None = None,
) -> tuple[Any, Any, None]:
    """Build the training and validation datasets. A collective: call it on every rank.

    The provider that ``pretrain`` gets must have ``is_distributed = True``. Without it only the
    first rank of each tensor-parallel group calls it, and the barriers inside hang
    (megatron/training/training.py:4547, 0.19.2).

    Args:
        run: a resolved run; ``data``, ``seed`` and ``architecture`` are read.
        train_val_test_num_samples: number of samples of each split, as ``pretrain`` passes them;
            None for one epoch, 0 for no set. The test split is not built.
        vp_stage: virtual pipeline stage, or None without virtual stages.
        is_built_on_rank: true on the ranks that read data, global rank 0 among them; by default
            the ranks on which Megatron's batch code reads.
        cache: folder of the sample indices; by default ``cache/`` in the folder of each source.

    Returns:
        Training set, validation set, and None for the test split; a set is None on ranks that read
        no data. Items are dictionaries of ``tokens``, ``labels``, ``loss_mask`` and
        ``position_ids``, ``[s]`` each with s the sequence length, and for packs those of
        `PackedDataset`. There is no attention mask: causality and windows are the attention's own.
        Samples of a blended validation also have
        their ``source``, a number.

    Raises:
        InputError: see :func:`check_data`.
    """
    data = check_data(run)
    # Every stage needs to be told the documents; only two read tokens or labels.
    every_stage = data.document_attention
    reads = (is_built_on_rank or (lambda: reads_data(vp_stage, every_stage=every_stage)))()
    train_samples, valid_samples = train_val_test_num_samples[:2]
    train = build_training_set(run, data, train_samples, reads=reads, cache=cache)
    valid = _validation_set(run, data, valid_samples, reads=reads, cache=cache)
    return train, valid, None


def build_training_set(
    run: Run, data: RunData, samples: int | None, *, reads: bool = True, cache: Path | None = None
) -> Any:
    """Build the training dataset; arguments as in `build_datasets`. None without `reads`."""
    sources = data.train
    if samples == 0:
        return None
    sets = _build(run, data, samples, split="train", reads=reads, cache=cache)
    if len(sources) == 1 or not reads:
        return sets[0]
    schedule, total = blend_of(run, sources, samples)
    return Blend(sets, schedule.locate, total)


def _validation_set(
    run: Run, data: RunData, samples: int | None, *, reads: bool, cache: Path | None
) -> Any:
    sources = data.valid
    if not sources or samples == 0:
        return None
    sets = _build(run, data, samples, split="valid", reads=reads, cache=cache)
    if len(sources) == 1 or not reads:
        return sets[0]
    shares = [count or 0 for count in source_counts(run, sources, "valid", samples)]
    ends = list(itertools.accumulate(shares))

    def locate(sample: int) -> tuple[int, int]:
        source = bisect_right(ends, sample)
        return source, sample - ends[source] + shares[source]

    return Blend(sets, locate, ends[-1], name_sources=True)


def _build(
    run: Run,
    data: RunData,
    samples: int | None,
    *,
    split: Split,
    reads: bool,
    cache: Path | None,
) -> list[Any]:
    """Build one Megatron dataset for each source; None in their places on ranks that read none."""
    sources = data.train if split == "train" else data.valid
    counts = source_counts(run, sources, split, samples)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    sets: list[Any] = [None] * len(sources)

    def build() -> None:
        for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
            sets[number] = (
                _packs(run, data, source, count, split=split)
                if source.shards
                else open_documents(index_of(run, data.tokenizer, source, count, split, cache))
            )

    # Rank 0 writes the indices that are missing, and the others load them.
    if reads and rank == 0:
        build()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if reads and rank != 0:
        build()
    return sets


def _packs(
    run: Run, data: RunData, source: Source, samples: int | None, *, split: Split
) -> PackedDataset:
    """Return the dataset over the packs of one source."""
    from megatron.core.datasets.utils import Split as MegatronSplit

    # All samples of a batch describe their documents in the same length.
    together = data.train if split == "train" else data.valid
    return PackedDataset(
        source.shards,
        samples=samples,
        # By content: a folder may move, and the order of the sources may change.
        key=key_of(seed_of(run, split), split, source.identity),
        index_split=MegatronSplit[split],
        document_attention=data.document_attention,
        max_pieces=max(shard.max_pieces for each in together for shard in each.shards),
    )


def open_documents(index: SampleIndex) -> IndexedDocuments:
    """Return Megatron's dataset over the documents of one source; build its index if missing."""
    # Megatron's compiled helpers and all of megatron.core, some seconds.
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.utils import Split as MegatronSplit

    from mellum2_megatron.data.feed.indexed_documents import EveryDocument, IndexedDocuments

    prefix = str(index.source.prefix)
    if index.size >= LARGE and not index.is_complete():
        logger.warning(
            "building the sample index of %s, %s, about %.0f minutes",
            prefix,
            size_text(index.size),
            index.seconds / 60,
        )
    config = GPTDatasetConfig(
        random_seed=index.seed,
        sequence_length=index.sequence_length,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(index.cache),
        tokenizer=dataclasses.replace(index.tokenizer, unique_identifiers=index.identity),
        # Positions and attention cross document ends, as by Megatron's default.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,  # the model learns to end a document
        create_attention_mask=False,
    )
    files = IndexedDocuments.build_low_level_dataset(prefix, config)
    return IndexedDocuments(
        files,
        index.dataset_path,
        EveryDocument(IndexedDocuments.numel_low_level_dataset(files)),
        index.samples,
        MegatronSplit[index.split],
        config,
    )


def reads_data(vp_stage: int | None, *, every_stage: bool = False) -> bool:
    """Return true on the first tensor-parallel rank of the first and the last pipeline stage.

    Megatron's batch code reads there, tokens on the first stage and labels on the last, and
    broadcasts to the other tensor-parallel ranks.

    Args:
        vp_stage: virtual pipeline stage, or None without virtual stages.
        every_stage: read on the stages between them too, default false.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return True
    ignore_virtual = vp_stage is None
    return bool(parallel_state.get_tensor_model_parallel_rank() == 0) and bool(
        every_stage
        or parallel_state.is_pipeline_first_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
        or parallel_state.is_pipeline_last_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
    )
