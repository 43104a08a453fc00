"""Sums of nats and bytes by document, collected while the model is validated.

The first tensor-parallel rank of the last pipeline stage has both: the sample as it was read, and
the loss of its tokens. Each such rank sums its own tokens; after the validation the sums of all
data- and context-parallel ranks are added in the order of the samples, so that the layout changes
no order. Other ranks do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state as mpu

from mellum2_megatron.data.feed.entries import tokenizer_folder
from mellum2_megatron.data.tokens.token_bytes import token_bytes
from mellum2_megatron.metrics.validation_sums import (
    ValidationSums,
    drop_sums_after,
    position_starts,
)
from mellum2_megatron.model.context_parallel import partition_indices
from mellum2_megatron.training.step import documents_of_stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mellum2_megatron.config import Run
    from mellum2_megatron.data.feed.fixed_validation import FixedValidation
    from mellum2_megatron.training.step import Batch

Rows = dict[str, npt.NDArray[Any]]
"""Columns of one length: sample, corpus, and either document or bucket, with their sums."""

_KEYS = {"documents": ("corpus", "document"), "positions": ("corpus", "bucket")}


class ValidationDocuments:
    """Collects the sums of each validation of a run, and writes them.

    Args:
        run: a resolved run.
        corpora: name of each validation set.
        folder: the run's folder.
    """

    def __init__(self, run: Run, *, corpora: Sequence[str], folder: Path) -> None:
        self.active = run.logging.validation_documents
        self._corpora, self._folder = tuple(corpora), folder
        self._starts = position_starts(run.data.sequence_length)
        self._bytes = np.zeros(run.architecture.vocab_size, dtype=np.int64)
        if self.active:
            sizes = token_bytes(tokenizer_folder(run.data))
            self._bytes[: len(sizes)] = sizes
        self._samples: FixedValidation | None = None
        self._rows: dict[str, list[Rows]] = {name: [] for name in _KEYS}

    def open(self, samples: FixedValidation | None, step: int) -> None:
        """Take the validation samples, on ranks that read them; call it before the first step.

        Args:
            samples: validation set of this rank; None where it reads none.
            step: step of the loaded checkpoint, 0 for a new run. Files of later ones are removed.
        """
        if not self.active:
            return
        if samples is not None:
            self._samples = samples
        if torch.distributed.get_rank() == 0:
            drop_sums_after(self._folder, step)

    def add(self, sample: Batch, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch.

        Args:
            sample: the micro-batch as it was read, `[b, s]` each field.
            loss: nats of this rank's tokens, `[b, s / cp]`, or `[1, b * s / cp]` of packs.
        """
        assert self._samples is not None
        mask, labels, positions = (
            _array(sample[name]).reshape(-1) for name in ("loss_mask", "labels", "position_ids")
        )
        numbers = _array(sample["sample"])
        length = mask.size // len(numbers)
        real, padded = sample.get("cu_seqlens"), sample.get("cu_seqlens_padded")
        bounds = [row * length for row in range(len(numbers) + 1)]
        if real is not None and padded is not None:
            bounds = documents_of_stream(real, padded)[1].tolist()
        cp, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
        places = partition_indices(bounds, cp, rank).numpy()
        mask = mask[places]
        nats = loss.detach().double().cpu().numpy().reshape(-1) * mask
        sizes = self._bytes[labels[places]] * (mask > 0)
        buckets = np.searchsorted(self._starts, positions[places], side="right") - 1
        for row, number in enumerate(numbers.tolist()):
            here = places // length == row
            corpus, starts, documents = self._samples.documents(number)
            units = np.searchsorted(starts, places[here] - row * length, side="right") - 1
            for kind, groups, count in (
                ("documents", units, len(starts)),
                ("positions", buckets[here], len(self._starts)),
            ):
                sums = {
                    name: np.bincount(groups, weights=values[here], minlength=count)
                    for name, values in (("tokens", mask), ("bytes", sizes), ("nats", nats))
                }
                keys = documents if kind == "documents" else np.arange(count, dtype=np.uint64)
                self._rows[kind].append(
                    {
                        "sample": np.full(count, number),
                        "corpus": np.full(count, corpus),
                        _KEYS[kind][1]: keys,
                        **sums,
                    }
                )

    def wrap_validation(self, validate: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `evaluate_and_print_results`, called at each validation on every rank."""

        @functools.wraps(validate)
        def validate_and_write(
            prefix: Any,
            forward_step_func: Any,
            data_iterator: Any,
            model: Any,
            iteration: int,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            for rows in self._rows.values():
                rows.clear()
            result = validate(
                prefix, forward_step_func, data_iterator, model, iteration, *args, **kwargs
            )
            if self.active and _collects():
                self._write(iteration)
            return result

        return validate_and_write

    def _write(self, step: int) -> None:
        """Add the rows of all ranks that collect, and write them on one of them."""
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        own = {kind: _joined(rows) for kind, rows in self._rows.items()}
        parts: list[dict[str, Rows]] = [own] * group.size()
        torch.distributed.all_gather_object(parts, own, group=group)
        if group.rank() != 0:
            return
        merged = {
            kind: _summed(_joined([part[kind] for part in parts if part[kind]]), keys)
            for kind, keys in _KEYS.items()
        }
        documents, positions = merged["documents"], merged["positions"]
        scored = documents["tokens"] > 0
        shape = len(self._corpora), len(self._starts)
        by_position = {name: np.zeros(shape) for name in ("tokens", "nats")}
        for name, table in by_position.items():
            table[positions["corpus"], positions["bucket"].astype(np.int64)] = positions[name]
        ValidationSums(
            corpora=self._corpora,
            document=documents["document"][scored],
            corpus=documents["corpus"][scored],
            tokens=documents["tokens"][scored].astype(np.int64),
            bytes=documents["bytes"][scored].astype(np.int64),
            nats=documents["nats"][scored],
            position_start=self._starts,
            position_tokens=by_position["tokens"].astype(np.int64),
            position_nats=by_position["nats"],
        ).write(self._folder, step)


def _collects() -> bool:
    """Return true on the ranks that have samples and their losses."""
    return bool(mpu.is_pipeline_last_stage(ignore_virtual=True)) and (
        mpu.get_tensor_model_parallel_rank() == 0
    )


def _array(tensor: torch.Tensor | None) -> npt.NDArray[Any]:
    assert tensor is not None
    array: npt.NDArray[Any] = tensor.cpu().numpy()
    return array


def _joined(rows: Sequence[Rows]) -> Rows:
    """Return the rows one after the other; nothing for none."""
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _summed(rows: Rows, keys: tuple[str, str]) -> Rows:
    """Return the rows summed over equal keys, in their order."""
    # By sample before the sum: floating point sums depend on their order.
    order = np.lexsort((rows["sample"], rows[keys[1]], rows[keys[0]]))
    ordered = {name: values[order] for name, values in rows.items()}
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = np.any([np.diff(ordered[key].astype(np.uint64)) != 0 for key in keys], axis=0)
    starts = np.flatnonzero(first)
    return {
        name: ordered[name][starts] if name in keys else np.add.reduceat(ordered[name], starts)
        for name in (*keys, "tokens", "bytes", "nats")
    }
