"""Megatron's own GPT datasets over a prepared folder, for ``megatron.training.pretrain``.

The same as ``pretrain_gpt.py`` of a Megatron-LM checkout, which the wheel does not ship:
``BlendedMegatronDatasetBuilder`` with ``GPTDataset``, one indexed dataset per split. A sample is
``sequence_length + 1`` tokens of the shuffled documents, one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.prepared_folder import load_prepared
from mellum2_megatron.data.tokens.tokenizer import special_ids, tokenizer_hash, vocab_size

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from mellum2_megatron.config import Run

logger = logging.getLogger(__name__)

Blend = tuple[tuple[float, str], ...]
"""(weight, prefix of an indexed dataset) of each dataset in a mixture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetTokenizer:
    """The attributes of a tokenizer that Megatron's datasets read; training encodes no text.

    Attributes:
        vocab_size: number of entries.
        eod, eos: id that ends each document.
        bos: id of the beginning-of-sequence token, or None.
        pad: -1, no token's id. Only a short last sample is padded, and its padding must not look
            like a real token: ``GPTDataset`` masks ``labels == pad`` and embeds such positions as
            token 0 (megatron/core/datasets/gpt_dataset.py:274-279, 0.19.2).
        unique_identifiers: part of the name of Megatron's index cache, so that new data never meets
            old indices.
    """

    vocab_size: int
    eod: int
    eos: int
    bos: int | None
    pad: int = -1
    unique_identifiers: dict[str, Any] = field(default_factory=dict)


def check_data(run: Run) -> DatasetTokenizer:
    """Check a run's data without torch: files, sizes, tokenizer and architecture.

    Returns:
        The tokenizer's attributes, with hashes or sizes of the data in ``unique_identifiers``.

    Raises:
        InputError: the prepared folder or a dataset is missing or truncated, or the tokenizer does
            not fit ``run.architecture``.
    """
    identity: dict[str, Any] = {}
    if not (run.data.train and run.data.valid):
        prepared = load_prepared(run.data.path)
        identity |= {split: statistics.bin_sha256 for split, statistics in prepared.splits.items()}
    for name, blend in (("train", run.data.train), ("valid", run.data.valid)):
        for _, prefix in blend:
            for suffix in (".bin", ".idx"):
                file = Path(prefix + suffix)
                if not file.is_file():
                    raise InputError(
                        f"data.{name}: {prefix}",
                        rule=f"{file} does not exist; "
                        "a prefix is the common path of a .bin and an .idx file",
                        fix="correct the prefix, or make the data with `mellum2 data prepare`",
                    )
                # Megatron's own datasets have no stored hash, and hashing them would take minutes.
                identity[str(file)] = file.stat().st_size
    folder = Path(run.data.tokenizer_folder)
    identifiers = special_ids(folder)
    tokenizer = DatasetTokenizer(
        vocab_size=vocab_size(folder),
        eod=identifiers["eos"],
        eos=identifiers["eos"],
        bos=identifiers.get("bos"),
        unique_identifiers={"tokenizer": tokenizer_hash(folder), **identity},
    )
    architecture = run.architecture
    value = f"tokenizer {run.data.tokenizer_folder}"
    fix = "prepare the data with a fitting tokenizer, or train an architecture that fits this one"
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            value,
            rule=f"it has {tokenizer.vocab_size} entries, "
            f"architecture.vocab_size is {architecture.vocab_size}",
            fix=fix,
        )
    for role, actual, wanted in (
        ("bos", tokenizer.bos, architecture.bos_token_id),
        ("eos", tokenizer.eos, architecture.eos_token_id),
    ):
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if actual is not None and wanted is not None and actual not in allowed:
            rule = f"its {role} id is {actual}, architecture.{role}_token_id is {wanted}"
            raise InputError(value, rule=rule, fix=fix)
    return tokenizer


def build_datasets(
    run: Run,
    train_val_test_num_samples: Sequence[int | None],
    *,
    vp_stage: int | None = None,
    is_built_on_rank: Callable[[], bool] | None = None,
    cache: Path | None = None,
) -> tuple[GPTDataset | None, GPTDataset | None, None]:
    """Build the training and validation datasets. A collective: call it on every rank.

    The provider that ``pretrain`` gets must have ``is_distributed = True``. Without it only the
    first rank of each tensor-parallel group calls it, and the barriers inside hang
    (megatron/training/training.py:4547, 0.19.2).

    Args:
        run: a resolved run; ``data``, ``seed`` and ``architecture`` are read.
        train_val_test_num_samples: number of samples of each split, as ``pretrain`` passes them;
            None for one epoch. The test split is not built.
        vp_stage: virtual pipeline stage, or None without virtual stages.
        is_built_on_rank: true on the ranks that read data, global rank 0 among them; by default
            the ranks on which Megatron's batch code reads.
        cache: folder of the sample indices; by default ``cache/`` in the prepared folder.

    Returns:
        Training set, validation set, and None for the test split; a set is None on ranks that read
        no data. Items are dictionaries of ``tokens``, ``labels``, ``loss_mask`` and
        ``position_ids``, ``[s]`` each with s the sequence length. There is no attention mask:
        causality and windows are the attention's own.

    Raises:
        InputError: see :func:`check_data`.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenizer = check_data(run)
    train_samples, valid_samples = train_val_test_num_samples[:2]
    cache = cache or Path(run.data.path) / "cache"
    config = GPTDatasetConfig(
        random_seed=run.seed if run.data.seed is None else run.data.seed,
        sequence_length=run.data.sequence_length,
        blend_per_split=[
            _blend(run.data.train_blend, train_samples),
            _blend(run.data.valid_blend, valid_samples),
            None,
        ],
        full_validation=valid_samples is None,
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        # Positions and attention cross document ends, as by Megatron's default.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,  # the model learns to end a document
        create_attention_mask=False,
    )
    _drop_broken_indices(cache)
    train, valid, _ = BlendedMegatronDatasetBuilder(
        GPTDataset,
        [train_samples, valid_samples, 0],
        is_built_on_rank or (lambda: _reads_data(vp_stage)),
        config,
    ).build()
    return train, valid, None


def _blend(blend: Blend, samples: int | None) -> tuple[list[str], list[float] | None]:
    """Return prefixes and weights of a blend, as Megatron takes them."""
    prefixes = [prefix for _, prefix in blend]
    # With weights Megatron would wrap a single set in a blend, and refuse to take one epoch
    # (megatron/core/datasets/blended_megatron_dataset_builder.py, 0.19.2).
    if len(prefixes) == 1 or samples is None:
        return prefixes, None
    return prefixes, [weight for weight, _ in blend]


def _reads_data(vp_stage: int | None) -> bool:
    """Return true on the first tensor-parallel rank of the first and the last pipeline stage.

    Megatron's batch code reads there, tokens on the first stage and labels on the last, and
    broadcasts to the other tensor-parallel ranks.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return True
    ignore_virtual = vp_stage is None
    return bool(parallel_state.get_tensor_model_parallel_rank() == 0) and bool(
        parallel_state.is_pipeline_first_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
        or parallel_state.is_pipeline_last_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
    )


def _drop_broken_indices(cache: Path) -> None:
    """Delete index files that a killed run left incomplete.

    Megatron writes them in place, and a later run loads any file of that name
    (megatron/core/datasets/gpt_dataset.py:557-571, 0.19.2).
    """
    import torch.distributed

    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        # Rank 0 builds first, the others wait for it in the builder's barrier.
        return
    groups = (
        {file.name.rsplit("-", 1)[0] for file in cache.glob("*.npy")} if cache.is_dir() else set()
    )
    for group in sorted(groups):
        try:
            # Mapping a file compares its length with its header, and reads none of the data.
            for kind in ("document_index", "sample_index", "shuffle_index"):
                np.load(cache / f"{group}-{kind}.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError):
            logger.warning(
                "sample indices %s were left incomplete by an earlier run; building them again",
                group,
            )
            for file in cache.glob(f"{group}-*"):
                file.unlink()
