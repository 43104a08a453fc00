"""Figures of GPUs from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from mellum2_megatron.common.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Speeds and memory of one device, as far as a roofline needs them.

    Attributes:
        label: name in texts and pictures.
        memory: bytes.
        bandwidth: bytes of memory read or written a second.
        flops: dense BF16 FLOP/s with accumulation in FP32.
        launch: seconds below which no operation comes.
        source: origin of memory, bandwidth and FLOP/s.
    """

    label: str
    memory: float
    bandwidth: float
    flops: float
    launch: float
    source: str


LAUNCH = 2.5e-6
"""Seconds of the shortest kernel inside a CUDA graph. An assumption of ours, measured nowhere."""


def _gpu(label: str, memory: float, bandwidth: float, flops: float, source: str) -> Machine:
    return Machine(
        label=label,
        memory=memory * 1e9,
        bandwidth=bandwidth * 1e9,
        flops=flops * 1e12,
        launch=LAUNCH,
        source=source,
    )


# Sheets print FLOP/s with sparsity for Hopper; dense is half of it.
GPUS: dict[str, Machine] = {
    "h100": _gpu("H100 SXM", 80, 3350, 989.5, "NVIDIA H100 data sheet: 1,979 TFLOP/s sparse"),
    "h200": _gpu("H200 SXM", 141, 4800, 989.5, "NVIDIA H200 data sheet: 1,979 TFLOP/s sparse"),
    "a100": _gpu("A100 SXM 80 GB", 80, 2039, 312, "NVIDIA A100 data sheet: 312 TFLOP/s dense"),
    "l40s": _gpu("L40S", 48, 864, 362.05, "NVIDIA L40S data sheet: 362.05 TFLOP/s dense"),
}
"""GPUs by the name that commands take. Memory in GB, bandwidth in GB/s, dense BF16 TFLOP/s."""


def find_gpu(name: str) -> Machine:
    """Return the GPU called ``name``.

    Raises:
        InputError: an unknown name; the message names the nearest.
    """
    if name not in GPUS:
        raise InputError(f"--gpu {name}", rule="no such GPU is known", fix=nearest(name, GPUS))
    return GPUS[name]
