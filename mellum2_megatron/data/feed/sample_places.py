"""The packs and documents of the samples that a run trains on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.feed.blend import Blend
from mellum2_megatron.data.feed.datasets import build_training_set
from mellum2_megatron.data.feed.packed_dataset import PackedDataset
from mellum2_megatron.data.feed.sources import check_data

if TYPE_CHECKING:
    from mellum2_megatron.config import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlace:
    """Origin of one training sample.

    Attributes:
        sample: number of the sample in the training.
        source: name of the set of tokens.
        files: prefix of the indexed dataset.
        pack: number of the pack in these files; None for a set that is not packed.
        epoch: earlier passes over the set; None for a set that is not packed.
        documents: hashes of the documents in a pack, in order; else their numbers in `files`.
    """

    sample: int
    source: str
    files: Path
    pack: int | None
    epoch: int | None
    documents: tuple[int, ...]


def samples_of_step(run: Run, step: int) -> range:
    """Return the samples of a step, the first step being 1.

    Raises:
        InputError: the run has no such step.
    """
    last = run.schedule.train_steps
    if not 1 <= step <= last:
        raise InputError(f"step {step}", rule=f"the run has steps 1 to {last}", fix="name one")
    return range(run.schedule.samples(step - 1), run.schedule.samples(step))


def places(run: Run, samples: Iterable[int]) -> Iterator[SamplePlace]:
    """Yield the origin of each sample. Sets that are not packed need their sample indices.

    Raises:
        InputError: the data are not here or do not fit the run, or a sample is not in them.
    """
    data = check_data(run)
    first, end = run.data.first_sample, run.schedule.train_samples
    cache = None if run.data.cache is None else Path(run.data.cache)
    dataset = build_training_set(run, data, end - first, cache=cache)
    for sample in samples:
        if not first <= sample < end:
            raise InputError(
                f"sample {sample}",
                rule=f"the run's own data are samples {first:,} to {end - 1:,}",
                fix="name one of them, or the run of that phase",
            )
        number, source, part = sample - first, 0, dataset
        if isinstance(dataset, Blend):
            source, number = dataset.locate(number)
            part = dataset.datasets[source]
        name = data.train[source].name
        if isinstance(part, PackedDataset):
            place = part.place(number)
            shard = part.shard(place.shard)
            yield SamplePlace(
                sample=sample,
                source=name,
                files=shard.prefix,
                pack=place.pack,
                epoch=place.epoch,
                documents=tuple(shard.pieces(place.pack).documents.tolist()),
            )
        else:
            yield SamplePlace(
                sample=sample,
                source=name,
                files=data.train[source].prefix,
                pack=None,
                epoch=None,
                documents=part.documents(number),
            )
