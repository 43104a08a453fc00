"""Figures of GPUs: memory as the driver reports it, speeds from their makers' data sheets.

The one table of cards: `mellum2 search` takes speeds from it, `memory_fit` the memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mellum2_megatron.common.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Speeds and memory of one device, as far as a roofline needs them.

    Attributes:
        label: name in texts and pictures.
        memory: bytes, as ``nvidia-smi`` reports them; data sheets print another unit.
        bandwidth: bytes of memory read or written a second.
        flops: dense BF16 FLOP/s with accumulation in FP32.
        launch: seconds below which no operation comes.
        source: origin of bandwidth and FLOP/s.
        memory_source: origin of the memory.
    """

    label: str
    memory: float
    bandwidth: float
    flops: float
    launch: float
    source: str
    memory_source: str


BLACKWELL = re.compile("B100|B200|B300")
BEFORE_HOPPER = re.compile(
    r"\b(V100|A100|A800|A40|A30|A10G?|A[24]|L40S?|L20|L4|T4|RTX [3-4]0\d\d|RTX A\d+)\b"
)
"""Names of cards, in the driver's texts and in `GPUS` alike."""

LAUNCH = 2.5e-6
"""Seconds of the shortest kernel inside a CUDA graph. An assumption of ours, measured nowhere."""

_REPORTED = "nvidia-smi, thundergolfer.com/blog/nvidia-gpu-memory-capacity"


def _gpu(
    label: str,
    mebibytes: int,
    bandwidth: float,
    flops: float,
    source: str,
    memory_source: str = _REPORTED,
) -> Machine:
    return Machine(
        label=label,
        memory=mebibytes * 2**20,
        bandwidth=bandwidth * 1e9,
        flops=flops * 1e12,
        launch=LAUNCH,
        source=source,
        memory_source=memory_source,
    )


# Sheets print FLOP/s with sparsity for Hopper and Blackwell; dense is half of it.
GPUS: dict[str, Machine] = {
    "h100": _gpu("H100 SXM", 81_559, 3350, 989.5, "NVIDIA H100 data sheet: 1,979 TFLOP/s sparse"),
    "h200": _gpu("H200 SXM", 143_771, 4800, 989.5, "NVIDIA H200 data sheet: 1,979 TFLOP/s sparse"),
    "b200": _gpu(
        "B200 SXM",
        183_359,
        8000,
        2250,
        "NVIDIA HGX B200 data sheet, of 8: 64 TB/s, 36 PFLOP/s sparse",
        "nvidia-smi, NVIDIA/TensorRT-LLM issue 10278",
    ),
    "a100-80": _gpu("A100 SXM 80 GB", 81_920, 2039, 312, "NVIDIA A100 data sheet: dense"),
    "a100-40": _gpu("A100 SXM 40 GB", 40_960, 1555, 312, "NVIDIA A100 data sheet: dense"),
    "l40s": _gpu("L40S", 46_068, 864, 362.05, "NVIDIA L40S data sheet: dense"),
}
"""GPUs by the name that commands take. Memory in MiB, bandwidth in GB/s, dense BF16 TFLOP/s."""


def find_gpu(name: str, *, key: str = "--gpu") -> Machine:
    """Return the GPU called ``name``.

    Args:
        name: a name of `GPUS`.
        key: where the name stands, for the message; default the option.

    Raises:
        InputError: an unknown name; the message names the nearest.
    """
    if name not in GPUS:
        raise InputError(f"{key} {name}", rule="no such GPU is known", fix=nearest(name, GPUS))
    return GPUS[name]
