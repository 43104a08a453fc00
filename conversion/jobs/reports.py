"""The plan before a conversion and the report after it, as values and as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conversion.huggingface.format import CONFIG_FILE, listed
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.files import size_text


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionPlan:
    """The effects that a conversion would have.

    Attributes:
        kind: ``import``, ``export`` or ``stitch-mtp``.
        source: folder to read.
        target: folder to write.
        dtype: dtype of the result.
        tensors: number of Hugging Face tensors.
        nbytes: size of all tensors written, bytes.
        files: (name, size of its tensors in bytes) of each weight file to be written.
        workers: number of units converted at a time.
        peak_memory: estimate of the most memory for tensors, bytes.
        process_memory: resident memory of this process before any tensor is read, bytes.
        free: free space of the target's disk, bytes.
        continued: number of units that an interrupted attempt has finished, and of all units.
        hashes: True if tensors would be compared with a manifest of the source.
        replaces: True if the target exists and is not empty.
    """

    kind: str
    source: Path
    target: Path
    dtype: str
    tensors: int
    nbytes: int
    files: tuple[tuple[str, int], ...]
    workers: int
    peak_memory: int
    process_memory: int
    free: int
    continued: tuple[int, int]
    hashes: bool
    replaces: bool

    def __str__(self) -> str:
        done, units = self.continued
        replaced = " (replaced)" if self.replaces else ""
        largest = size_text(max(size for _, size in self.files))
        memory = size_text(self.peak_memory + self.process_memory)
        hashes = "checked against the manifest" if self.hashes else "no manifest to check against"
        lines = [
            f"{self.kind} {self.source} -> {self.target}{replaced}",
            f"  tensors      {amount(self.tensors, self.nbytes, self.dtype)}",
            f"  files        {len(self.files)}: {self.files[0][0]} .. {self.files[-1][0]}, "
            f"largest {largest}",
            f"  peak memory  about {memory} with {self.workers} workers",
            f"  disk         {size_text(self.free)} free",
            f"  hashes       {hashes}",
        ]
        if done:
            lines.append(
                f"  continues    an interrupted attempt, {done} of {units} parts are there"
            )
        return "\n".join([*lines, "nothing was written"])


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """The result of a conversion.

    Attributes:
        path: folder written.
        architecture: architecture of the model in it.
        dtype: dtype of its weights.
        tensors: number of Hugging Face tensors.
        nbytes: size of all tensors, bytes.
        seconds: wall time.
    """

    path: Path
    architecture: Mellum2Architecture
    dtype: str
    tensors: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        written = amount(self.tensors, self.nbytes, self.dtype)
        return f"wrote {self.path}: {written} in {self.seconds:.1f} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTripReport:
    """The result of an import followed by an export.

    Attributes:
        path: folder that was converted.
        dtype: dtype of its weights.
        tensors: number of its tensors.
        nbytes: size of all tensors, bytes.
        seconds: wall time.
        differing: names of the tensors whose bytes changed.
        same_architecture: True if config.json still describes the same model.
    """

    path: Path
    dtype: str
    tensors: int
    nbytes: int
    seconds: float
    differing: tuple[str, ...]
    same_architecture: bool

    @property
    def ok(self) -> bool:
        """True if nothing changed."""
        return not self.differing and self.same_architecture

    def __str__(self) -> str:
        converted = amount(self.tensors, self.nbytes, self.dtype)
        done = f"{self.path}: {converted} there and back in {self.seconds:.1f} s"
        if self.ok:
            return f"{done}, every byte the same"
        changed = [*self.differing, *([] if self.same_architecture else [CONFIG_FILE])]
        return f"{done}, {len(changed)} changed: {listed(changed, 10)}"


def amount(tensors: int, nbytes: int, dtype: str) -> str:
    """Return ``5631 tensors, 24.30 GB bfloat16``."""
    return f"{tensors} tensors, {size_text(nbytes)} {dtype}"
