"""The engine of every conversion: `ConversionJob.plan` reports a job, `ConversionJob.run` does it.

No tensor passes through this module. It hands units to workers, counts progress, keeps finished
units for the next attempt and makes the report. One function of each conversion's own module moves
a tensor from file to file: `importing.ImportJob.convert`, `exporting.ExportJob.convert`,
`mtp_stitching.StitchJob.convert`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from conversion.huggingface.dtypes import Dtypes
from conversion.huggingface.format import dtype_name, torch_dtype
from conversion.jobs.reports import ConversionPlan, ConversionReport
from conversion.jobs.result_folder import (
    check_space,
    check_target,
    finished_units,
    result_folder,
)
from conversion.jobs.tensor_checks import TensorChecks
from conversion.jobs.weights_manifest import WeightRecord
from conversion.jobs.workers import Stop, run_units, worker_count
from conversion.mapping import Entry
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.byte_progress import byte_progress
from mellum2_megatron.common.errors import InputError

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Function to call with the size of each converted tensor, in bytes.

It raises CancelledError once another unit has failed.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionRequest:
    """The caller's options, the same for every kind of conversion.

    Attributes:
        target: folder to write.
        dtype: dtype of the result; None: the source's own.
        keep_dtypes: allow a source of several dtypes, and keep each tensor's, default False.
        overwrite: replace an earlier result, default False.
        workers: number of units converted at a time, default one per core, at most 8.
        checks: checks of each tensor, default `TensorChecks()`.
    """

    target: Path
    dtype: torch.dtype | None
    keep_dtypes: bool
    overwrite: bool
    workers: int
    checks: TensorChecks

    @classmethod
    def of(
        cls,
        target: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        keep_dtypes: bool = False,
        overwrite: bool = False,
        workers: int | None = None,
        checks: TensorChecks | None = None,
    ) -> ConversionRequest:
        """Return the request with its defaults filled in.

        Raises:
            InputError: an unknown dtype, both a dtype and ``keep_dtypes``, or fewer workers than
                one.
        """
        if dtype is not None and keep_dtypes:
            raise InputError(
                f"--torch-dtype {dtype} with --keep-dtypes",
                rule="the one converts every tensor, the other none",
                fix="give one of them",
            )
        return cls(
            target=Path(target),
            dtype=torch_dtype(dtype) if dtype is not None else None,
            keep_dtypes=keep_dtypes,
            overwrite=overwrite,
            workers=worker_count(workers),
            checks=checks or TensorChecks(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionUnit:
    """Entries that one worker converts into a file or a part of one.

    Attributes:
        name: name in the journal, unique in its job.
        file: file of the result, relative to the result's folder.
        entries: entries of the mapping table, in the order they are written.
        nbytes: size of the written tensors, bytes.
        peak: most memory for tensors during the conversion, bytes.
    """

    name: str
    file: str
    entries: tuple[Entry, ...]
    nbytes: int
    peak: int


class ConversionJob(ABC):
    """One conversion, described; `plan` reports it and `run` carries it out.

    A subclass sets the attributes in its constructor, without reading weights, and carries out
    three steps: `prepare` once, `convert` for each unit in any thread, `finish` once.

    Attributes:
        kind: ``import``, ``export`` or ``stitch-mtp``.
        request: the caller's options.
        source: folder to read.
        source_files: files of the source; once one has changed, a partial result is discarded.
        architecture: architecture of the result.
        dtypes: dtype of each tensor of the result.
        units: all of the work, in the order of the result.
        has_manifest: True if tensors are compared with a manifest of the source.
    """

    kind: str
    source: Path
    source_files: Sequence[Path]
    architecture: Mellum2Architecture
    dtypes: Dtypes
    units: Sequence[ConversionUnit]
    has_manifest: bool

    def __init__(self, request: ConversionRequest) -> None:
        self.request = request

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Create the files that units write into; keep those of an earlier attempt."""

    @abstractmethod
    def convert(
        self, unit: ConversionUnit, folder: Path, progress: Progress
    ) -> tuple[dict[str, Any], int]:
        """Write ``unit`` to the disk.

        Returns:
            The unit's payload for `finish`, of JSON values, and the least size that its file now
            has, in bytes.
        """

    @abstractmethod
    def finish(self, folder: Path, payloads: Sequence[dict[str, Any]]) -> None:
        """Complete ``folder``, given the payload of every unit in the order of `units`."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors written."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def tensors(self) -> int:
        """Number of Hugging Face tensors converted."""
        return sum(len(entry.sources) for unit in self.units for entry in unit.entries)

    def plan(self) -> ConversionPlan:
        """Return the plan of `run`; reads no weight and writes nothing.

        Raises:
            InputError: the target cannot be used.
            WorkError: the disk is too full.
        """
        target, workers = self.request.target, self.request.workers
        # The same checks in the same order as `result_folder`, which `run` enters.
        check_target(target, self.source, self.request.overwrite)
        done = finished_units(target, self._identity())
        free = check_space(target, sum(unit.nbytes for unit in self.units if unit.name not in done))
        files: dict[str, int] = {}
        for unit in self.units:
            files[unit.file] = files.get(unit.file, 0) + unit.nbytes
        # The worst case: all workers convert the largest units at once.
        peaks = sorted((unit.peak for unit in self.units), reverse=True)
        return ConversionPlan(
            kind=self.kind,
            source=self.source,
            target=target,
            dtype=str(self.dtypes),
            tensors=self.tensors,
            nbytes=self.nbytes,
            files=tuple(files.items()),
            workers=workers,
            peak_memory=sum(peaks[:workers]),
            process_memory=psutil.Process().memory_info().rss,
            free=free,
            continued=(len(done), len(self.units)),
            hashes=self.has_manifest,
            replaces=target.is_dir() and any(target.iterdir()),
        )

    def run(self) -> ConversionReport:
        """Convert, or resume an interrupted attempt.

        Raises:
            InputError: the target cannot be used, or a weight fails a check; nothing is left.
            WorkError: writing failed; finished units are kept for the next attempt.
        """
        start = time.monotonic()
        stop = Stop()
        with result_folder(
            self.request.target,
            source=self.source,
            units={unit.name: unit.nbytes for unit in self.units},
            overwrite=self.request.overwrite,
            identity=self._identity(),
        ) as result:
            # When resuming too: `prepare` opens the files, and keeps those that exist.
            self.prepare(result.folder)
            todo = [unit for unit in self.units if unit.name not in result.done]
            already = self.nbytes - sum(unit.nbytes for unit in todo)
            with byte_progress(self.kind, self.nbytes, done=already) as advance:

                def progress(nbytes: int) -> None:
                    advance(nbytes)
                    stop.check()

                def work(unit: ConversionUnit) -> None:
                    stop.check()
                    payload, size = self.convert(unit, result.folder, progress)
                    # After `convert`, which has forced the unit to the disk: the journal never
                    # lists what a power failure could take back.
                    result.mark(unit.name, payload, {unit.file: size})

                run_units(todo, work, workers=self.request.workers, stop=stop)
            self.finish(result.folder, [result.done[unit.name] for unit in self.units])
        return ConversionReport(
            path=self.request.target,
            architecture=self.architecture,
            dtype=str(self.dtypes),
            tensors=self.tensors,
            nbytes=self.nbytes,
            seconds=time.monotonic() - start,
        )

    def _identity(self) -> dict[str, Any]:
        """Return everything that the written bytes depend on.

        A partial result of another identity is discarded.
        """
        # Sizes and times instead of hashes, which would cost a second reading of the source.
        stats = {str(path): path.stat() for path in self.source_files}
        return {
            "conversion": self.kind,
            # Another version may write other bytes: halves of the two would not fit together.
            "version": importlib.metadata.version("mellum2-megatron"),
            "source": str(self.source.resolve()),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "dtype": dtype_name(self.dtypes.main),
            "dtypes": self.dtypes.others,
            "checks": asdict(self.request.checks),
            # Units by name and size: another cut into files moves tensors between them.
            "units": {unit.name: unit.nbytes for unit in self.units},
            "architecture": self.architecture.to_dict(),
        }


def records_of(payloads: Iterable[dict[str, Any]]) -> list[WeightRecord]:
    """Return the records in the payloads of units."""
    return [WeightRecord.from_dict(values) for payload in payloads for values in payload["records"]]


def result_dtypes(
    where: object, entries: Sequence[Entry], stored: Dtypes, request: ConversionRequest
) -> Dtypes:
    """Return the dtypes of a result; a warning names what another dtype rounds in a mixture.

    Args:
        where: the source, for messages.
        entries: entries of the mapping table.
        stored: dtypes of the source.
        request: the caller's options.

    Raises:
        InputError: a mixture that the user has not settled, or that Megatron cannot store.
    """
    if request.dtype is not None:
        if not stored.is_uniform and (rounded := stored.rounded_by(request.dtype)):
            logger.warning(
                "%s: %d tensors are rounded to %s, first %s",
                where,
                len(rounded),
                dtype_name(request.dtype),
                rounded[0],
            )
        return Dtypes.uniform(entries, request.dtype)
    if request.keep_dtypes:
        stored.require_storable(where, entries)
    else:
        stored.require_uniform(where)
    return stored
