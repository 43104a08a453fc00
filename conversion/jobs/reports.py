"""What a conversion says: the plan before it, the report after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conversion.huggingface.folder import CONFIG_FILE, listed
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.files import size_text


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionPlan:
    """What a conversion would do.

    Attributes:
        kind: ``import`` or ``export``.
        files: weight files to be written, with their bytes of tensors.
        peak_memory: bytes of tensors in memory at most, about.
        process_memory: bytes this process takes beside them.
        free: free bytes of the target's disk.
        continued: units of an interrupted attempt that need not be done again, and their number in
            all.
        hashes: whether the source has a manifest that would be checked.
        replaces: whether the target exists.
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
        lines = [
            f"{self.kind} {self.source} -> {self.target}{' (replaced)' if self.replaces else ''}",
            f"  tensors      {amount(self.tensors, self.nbytes, self.dtype)}",
            f"  files        {len(self.files)}: {self.files[0][0]} .. {self.files[-1][0]}, "
            f"largest {size_text(max(size for _, size in self.files))}",
            f"  peak memory  about {size_text(self.peak_memory + self.process_memory)} with {self.workers} workers",
            f"  disk         {size_text(self.free)} free",
            f"  hashes       {'checked against the manifest' if self.hashes else 'no manifest to check against'}",
        ]
        if done:
            lines.append(
                f"  continues    an interrupted attempt, {done} of {units} parts are there"
            )
        return "\n".join([*lines, "nothing was written"])


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """What a conversion wrote: Hugging Face tensors counted, bytes of weights, seconds of wall
    time."""

    path: Path
    architecture: Mellum2Architecture
    dtype: str
    tensors: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        return f"wrote {self.path}: {amount(self.tensors, self.nbytes, self.dtype)} in {self.seconds:.1f} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTripReport:
    """What import followed by export did to a folder: ``differing`` names every tensor whose bytes
    changed."""

    path: Path
    dtype: str
    tensors: int
    nbytes: int
    seconds: float
    differing: tuple[str, ...]
    same_architecture: bool

    @property
    def ok(self) -> bool:
        return not self.differing and self.same_architecture

    def __str__(self) -> str:
        done = f"{self.path}: {amount(self.tensors, self.nbytes, self.dtype)} there and back in {self.seconds:.1f} s"
        if self.ok:
            return f"{done}, every byte the same"
        changed = [*self.differing, *([] if self.same_architecture else [CONFIG_FILE])]
        return f"{done}, {len(changed)} changed: {listed(changed, 10)}"


def amount(tensors: int, nbytes: int, dtype: str) -> str:
    """``5631 tensors, 24.30 GB bfloat16``."""
    return f"{tensors} tensors, {size_text(nbytes)} {dtype}"
