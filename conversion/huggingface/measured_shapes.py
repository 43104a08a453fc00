"""Small shapes timed with transformers on this CPU, beside the analytic times of `mellum2 search`.

Only the order of the shapes is compared: the CPU is described by three measured speeds, and
transformers launches far more operations than the roofline counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from conversion.huggingface.timed_engine import TransformersEngine, random_model
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.planning.gpus import Machine
from mellum2_megatron.planning.latency import CostModel, Workload, rank_correlation

MOST_SHAPES, MOST_WEIGHTS = 16, 200_000_000
"""Largest number of shapes, and of the weights of one; all are in memory together."""
_FLOAT32_PER_BF16 = 2


def measure_shapes(
    shapes: Sequence[Mellum2Architecture], workload: Workload, *, repeats: int = 3
) -> dict[str, Any]:
    """Return measured and analytic times of one request alone on this CPU, as JSON types.

    Args:
        shapes: models; their weights are random.
        workload: request.
        repeats: rounds, default 3, after one that warms up. The shortest time of a shape counts:
            other processes only make it longer.

    Returns:
        ``machine``, the CPU's measured speeds; ``rows`` with ``layers``, ``hidden``, ``measured``
        and ``analytic`` in seconds; ``rank_correlation``, Spearman's.

    Raises:
        InputError: fewer than three shapes, too many, or one that is too large.
    """
    if not 3 <= len(shapes) <= MOST_SHAPES:
        raise InputError(
            f"--measure with {len(shapes)} shapes",
            rule=f"a correlation needs 3, and {MOST_SHAPES} are the most",
            fix="give other values of --layers and --hidden",
        )
    for shape in shapes:
        if shape.num_parameters(mtp=False) > MOST_WEIGHTS:
            raise InputError(
                f"--measure with {shape.num_hidden_layers} layers of {shape.hidden_size}",
                rule=f"a measured shape has {MOST_WEIGHTS:,} weights at most",
                fix="take mellum2-tiny as the base, and smaller --layers and --hidden",
            )
    machine = this_cpu()
    analytic = [CostModel(shape).latency(machine, workload).sync for shape in shapes]
    engines = [TransformersEngine(random_model(shape), None, use_mtp=False) for shape in shapes]
    prompt = torch.randint(
        min(shape.vocab_size for shape in shapes),
        (workload.prompt,),
        generator=torch.Generator().manual_seed(1),
    ).tolist()
    measured = [math.inf] * len(shapes)
    for number in range(repeats + 1):
        for place, engine in enumerate(engines):
            (answer,) = engine.answer([prompt], workload.output)
            if number:
                measured[place] = min(measured[place], answer.seconds)
    rows = [
        {
            "layers": shape.num_hidden_layers,
            "hidden": shape.hidden_size,
            "measured": seconds,
            "analytic": estimate,
        }
        for shape, seconds, estimate in zip(shapes, measured, analytic, strict=True)
    ]
    return {
        "machine": {
            "bandwidth": machine.bandwidth,
            "flops": machine.flops,
            "launch": machine.launch,
        },
        "rows": rows,
        "rank_correlation": rank_correlation(measured, analytic),
    }


def this_cpu() -> Machine:
    """Return this CPU with measured speeds, for models in float32.

    Its bandwidth is halved, because the roofline counts two bytes for each number.
    """
    square = torch.ones(768, 768)
    numbers = torch.ones(1 << 24)
    target, small = torch.empty_like(numbers), torch.ones(8)
    product = _shortest(lambda: square @ square)
    copy = _shortest(lambda: target.copy_(numbers))
    launch = _shortest(lambda: small + small)
    moved = 2 * numbers.numel() * numbers.element_size()
    return Machine(
        label="this CPU",
        memory=float(psutil.virtual_memory().total),
        bandwidth=moved / copy / _FLOAT32_PER_BF16,
        flops=2 * 768**3 / product,
        launch=launch,
        source="measured: a product of 768, a copy of 64 MB, an addition of 8 numbers",
        memory_source="the operating system",
    )


def _shortest(work: Callable[[], object], repeats: int = 10) -> float:
    """Return the shortest time of several runs, in seconds."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
