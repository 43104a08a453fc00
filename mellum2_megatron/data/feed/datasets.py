"""Megatron's own GPT datasets over a prepared folder, for ``megatron.training.pretrain``.

What ``pretrain_gpt.py`` does in a Megatron-LM checkout (the wheel does not ship it):
``BlendedMegatronDatasetBuilder`` with ``GPTDataset``, one indexed dataset a split. Samples are
drawn by greedy concatenation of shuffled documents.
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
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from mellum2_megatron.config import Run

logger = logging.getLogger(__name__)

Blend = tuple[tuple[float, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetTokenizer:
    """The few facts about a tokenizer that Megatron's datasets ask for; no text is encoded while
    training.

    ``pad`` is -1: complete samples hold no padding, and the filling of a short last sample must not
    look like a real token. ``GPTDataset`` masks ``labels == pad`` and embeds such positions as
    token 0 (``megatron/core/datasets/gpt_dataset.py:274-279`` (0.19.2)).
    """

    vocab_size: int
    eod: int
    eos: int
    bos: int | None
    pad: int = -1
    unique_identifiers: dict[str, Any] = field(default_factory=dict)
    """Part of the name of Megatron's index cache, so that new data never meets old indices."""


def check_data(run: Run) -> DatasetTokenizer:
    """Check what can be known about a run's data without torch: files, sizes, tokenizer,
    architecture.

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
                        rule=f"{file} does not exist; a prefix is the common path of a .bin and an .idx file",
                        fix="correct the prefix, or make the data with `mellum2 data prepare`",
                    )
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
    _check_architecture(run, tokenizer)
    return tokenizer


def build_datasets(
    run: Run,
    train_val_test_num_samples: Sequence[int | None],
    *,
    vp_stage: int | None = None,
    is_built_on_rank: Callable[[], bool] | None = None,
    cache: Path | None = None,
) -> tuple[GPTDataset | None, GPTDataset | None, None]:
    """Training and validation datasets, and None for the test split. A collective: call it on every
    rank.

    Items are dictionaries of ``tokens``, ``labels``, ``loss_mask``, ``position_ids``, each
    ``[sequence_length]``, without an attention mask (causal and window masks are the attention's
    own).

    Hand it to ``pretrain`` as a function of the sample counts (and ``vp_stage``) with
    ``is_distributed = True`` on it; otherwise only the first rank of each tensor-parallel group
    calls it, and the barriers inside hang (``megatron/training/training.py:4547`` (0.19.2)).

    Args:
        run: reads ``run.data``, ``run.seed`` and ``run.architecture``.
        train_val_test_num_samples: samples needed a split, as ``pretrain`` passes them; None means
            one epoch. The test split is not built.
        vp_stage: virtual pipeline stage, when there is one.
        is_built_on_rank: which ranks read data; by default those that Megatron's batch code reads
            on (first tensor-parallel rank of the first and last pipeline stage). Must be true on
            global rank 0.
        cache: folder for the sample indices; by default ``cache/`` in the prepared folder.

    Raises:
        InputError: see :func:`check_data`.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    tokenizer = check_data(run)
    train_samples, valid_samples = train_val_test_num_samples[:2]
    config = _dataset_config(
        run, tokenizer, train_samples, valid_samples, cache or Path(run.data.path) / "cache"
    )
    _drop_broken_indices(Path(str(config.path_to_cache)))
    built = is_built_on_rank or (lambda: _reads_data(vp_stage))
    train, valid, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [train_samples, valid_samples, 0], built, config
    ).build()
    return train, valid, None


def _dataset_config(
    run: Run,
    tokenizer: DatasetTokenizer,
    train_samples: int | None,
    valid_samples: int | None,
    cache: Path,
) -> GPTDatasetConfig:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
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
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,  # the model learns to end a document
        create_attention_mask=False,
    )


def _blend(blend: Blend, samples: int | None) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights; Megatron wants no weights for a single set or for one epoch of
    everything."""
    prefixes = [prefix for _, prefix in blend]
    return prefixes, None if len(prefixes) == 1 or samples is None else [
        weight for weight, _ in blend
    ]


def _check_architecture(run: Run, tokenizer: DatasetTokenizer) -> None:
    value = f"tokenizer {run.data.tokenizer_folder}"
    fix = "prepare the data with a fitting tokenizer, or train an architecture that fits this one"
    architecture = run.architecture
    if tokenizer.vocab_size > architecture.vocab_size:
        rule = f"it has {tokenizer.vocab_size} entries, architecture.vocab_size is {architecture.vocab_size}"
        raise InputError(value, rule=rule, fix=fix)
    for role, found, wanted in (
        ("bos", tokenizer.bos, architecture.bos_token_id),
        ("eos", tokenizer.eos, architecture.eos_token_id),
    ):
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if found is not None and wanted is not None and found not in allowed:
            rule = f"its {role} id is {found}, architecture.{role}_token_id is {wanted}"
            raise InputError(value, rule=rule, fix=fix)


def _reads_data(vp_stage: int | None) -> bool:
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

    Megatron writes them in place, and later loads whatever is there (``gpt_dataset.py:557-571``
    (0.19.2)).
    """
    import torch.distributed

    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return  # rank 0 builds first, the others wait for it in the builder's barrier
    groups = (
        {file.name.rsplit("-", 1)[0] for file in cache.glob("*.npy")} if cache.is_dir() else set()
    )
    for group in sorted(groups):
        try:
            for kind in ("document_index", "sample_index", "shuffle_index"):
                np.load(cache / f"{group}-{kind}.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError):
            logger.warning(
                "sample indices %s were left incomplete by an earlier run; building them again",
                group,
            )
            for file in cache.glob(f"{group}-*"):
                file.unlink()
