"""What import and export share: units of work, done by workers, continued after an interruption,
checked on the way."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from conversion.huggingface.folder import dtype_name
from conversion.jobs.reports import ConversionPlan, ConversionReport
from conversion.jobs.result_folder import (
    PartialResult,
    check_space,
    check_target,
    finished_units,
    result_folder,
)
from conversion.jobs.weights_manifest import Manifest, WeightRecord
from conversion.jobs.workers import Stop, run_units
from conversion.mapping import Entry
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.byte_progress import byte_progress
from mellum2_megatron.common.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Entries that one worker converts into one file, or one part of a file.

    Attributes:
        name: unique in its job.
        file: file of the result, relative to it.
        nbytes: size of its tensors when written.
        peak: bytes in memory at most while it is converted.
    """

    name: str
    file: str
    entries: tuple[Entry, ...]
    nbytes: int
    peak: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """What is looked at while weights pass."""

    hashes: bool = True
    allow_nonfinite: bool = False


class Job(ABC):
    """One conversion, planned; `run` does it.

    Attributes:
        kind: ``import``, ``export`` or ``stitch-mtp``.
        source: folder that is read.
        target: folder to write.
        architecture: of what is written.
        dtype: of what is written.
        units: all of the work.
        manifest: the source's, when it has one and hashes are checked.
        folder: where the result grows, while `run` runs.
    """

    kind: str
    source: Path
    architecture: Mellum2Architecture
    dtype: torch.dtype
    units: list[Unit]
    manifest: Manifest | None
    folder: Path

    def __init__(self, target: Path, *, workers: int, overwrite: bool, checks: Checks) -> None:
        self.target = target
        self.workers = workers
        self.overwrite = overwrite
        self.checks = checks
        self._stop = Stop()
        self._advance: Callable[[int], None] = lambda nbytes: None

    @abstractmethod
    def source_files(self) -> Iterable[Path]:
        """The files whose change makes this another conversion."""

    @abstractmethod
    def prepare(self) -> None:
        """Make in ``folder`` what units write into; parts of it may be there from an earlier
        attempt."""

    @abstractmethod
    def convert(self, unit: Unit) -> tuple[dict[str, Any], int]:
        """Write ``unit`` to the disk; return what `finish` needs of it, and the size its file has
        at least."""

    @abstractmethod
    def finish(self, payloads: Sequence[dict[str, Any]]) -> None:
        """Write what makes ``folder`` complete, given the payload of every unit."""

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    @property
    def tensors(self) -> int:
        return sum(len(entry.sources) for unit in self.units for entry in unit.entries)

    def run(self) -> ConversionReport:
        """Convert.

        Raises:
            InputError: the target cannot be used, or a weight fails a check; nothing was left.
            WorkError: writing failed; finished units wait to be continued.
        """
        start = time.monotonic()
        sizes = {unit.name: unit.nbytes for unit in self.units}
        with result_folder(
            self.target,
            source=self.source,
            units=sizes,
            overwrite=self.overwrite,
            identity=self._identity(),
        ) as result:
            self.folder = result.folder
            self.prepare()
            todo = [unit for unit in self.units if unit.name not in result.done]
            done = self.nbytes - sum(unit.nbytes for unit in todo)
            with byte_progress(self.kind, self.nbytes, done=done) as self._advance:
                run_units(
                    todo, lambda unit: self._do(unit, result), workers=self.workers, stop=self._stop
                )
            self.finish([result.done[unit.name] for unit in self.units])
        return ConversionReport(
            path=self.target,
            architecture=self.architecture,
            dtype=dtype_name(self.dtype),
            tensors=self.tensors,
            nbytes=self.nbytes,
            seconds=time.monotonic() - start,
        )

    def plan(self) -> ConversionPlan:
        """Say what `run` would do, and refuse what it would refuse before reading weights; touches
        nothing."""
        check_target(self.target, self.source, self.overwrite)
        done = finished_units(self.target, self._identity())
        free = check_space(
            self.target, sum(unit.nbytes for unit in self.units if unit.name not in done)
        )
        files: dict[str, int] = {}
        for unit in self.units:
            files[unit.file] = files.get(unit.file, 0) + unit.nbytes
        peaks = sorted((unit.peak for unit in self.units), reverse=True)
        return ConversionPlan(
            kind=self.kind,
            source=self.source,
            target=self.target,
            dtype=dtype_name(self.dtype),
            tensors=self.tensors,
            nbytes=self.nbytes,
            files=tuple(files.items()),
            workers=self.workers,
            peak_memory=sum(peaks[: self.workers]),
            process_memory=psutil.Process().memory_info().rss,
            free=free,
            continued=(len(done), len(self.units)),
            hashes=self.manifest is not None,
            replaces=self.target.is_dir() and any(self.target.iterdir()),
        )

    def passed(self, nbytes: int) -> None:
        """Count progress; ends this worker when another has failed."""
        self._advance(nbytes)
        self._stop.check()

    def read_checked(
        self, name: str, tensor: torch.Tensor, manifest: Manifest | None
    ) -> tuple[torch.Tensor, WeightRecord | None]:
        """Check a source tensor and return it in the wanted dtype, and its record if that needed no
        conversion."""
        record = None
        if manifest is not None:
            record = WeightRecord.of(name, tensor)
            manifest.check(record)
        self._check_finite(
            name, tensor, "a model's weights are numbers", "use an earlier or another checkpoint"
        )
        if tensor.dtype == self.dtype:
            return tensor, record
        converted = tensor.to(self.dtype)
        if not self.checks.allow_nonfinite:
            wanted = dtype_name(self.dtype)
            self._check_finite(
                name, converted, f"they overflow {wanted}", "convert to bfloat16 or float32"
            )
        return converted, None

    def _check_finite(self, name: str, tensor: torch.Tensor, rule: str, fix: str) -> None:
        low, high = torch.aminmax(tensor)  # one fast pass; NaN propagates
        if torch.isfinite(low) and torch.isfinite(high):
            return
        count = int((~torch.isfinite(tensor)).sum())
        found = f"tensor {name!r} has {count} of {tensor.numel()} values NaN or infinite"
        if not self.checks.allow_nonfinite:
            raise InputError(
                found, rule=rule, fix=f"{fix}, or pass --allow-nonfinite to convert it as it is"
            )
        logger.warning("%s", found)

    def _do(self, unit: Unit, result: PartialResult) -> None:
        self._stop.check()
        payload, size = self.convert(unit)
        result.mark(unit.name, payload, {unit.file: size})

    def _identity(self) -> dict[str, Any]:
        files = {str(path): path.stat() for path in self.source_files()}
        return {
            "conversion": self.kind,
            "version": importlib.metadata.version("mellum2-megatron"),
            "source": str(self.source.resolve()),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()},
            "dtype": dtype_name(self.dtype),
            "checks": asdict(self.checks),
            "units": {unit.name: unit.nbytes for unit in self.units},
            "architecture": self.architecture.to_dict(),
        }


def records_of(payloads: Iterable[dict[str, Any]]) -> list[WeightRecord]:
    """The records in the payloads of units."""
    return [WeightRecord.from_dict(values) for payload in payloads for values in payload["records"]]


def entry_bytes(entries: Iterable[Entry], dtype: torch.dtype) -> int:
    """Size of the entries' tensors in ``dtype``."""
    return sum(math.prod(entry.shape) for entry in entries) * dtype.itemsize
