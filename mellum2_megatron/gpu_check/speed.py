"""Pieces about speed and memory: pairs of settings, measured by `benchmarks/train_step.py`."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from typing import Any

from mellum2_megatron.common.files import size_text
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.gpu_check.piece import (
    Outcome,
    PieceError,
    SkipPiece,
    Workplace,
    cause,
    passed_figures,
)
from mellum2_megatron.planning.optional_packages import missing_dispatcher

BENCHMARK = "benchmarks/train_step.py"

MARGIN = 0.05
"""Share by which measured memory may lie outside of its estimated bounds. Above them, runs that
should fit may not. Ours: what an allocator rounds up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Two values of a setting, each measured as an arm of the benchmark.

    Attributes:
        key: the setting.
        values: both values; the first is that of the first arm.
        arms: names of the two arms.
        exchange: true if it is about the exchange of tokens, which needs several GPUs; default
            false.
    """

    key: str
    values: tuple[str, str]
    arms: tuple[str, str]
    exchange: bool = False


_BF16, _FP8 = "te-bf16-muon-mtp", "te-fp8-muon-mtp"

CHOICES = {
    "speed_precision": Choice(key="precision.compute", values=("bf16", "fp8"), arms=(_BF16, _FP8)),
    "speed_padding": Choice(
        key="execution.pad_expert_tokens",
        values=("false", "true"),
        arms=(_FP8, f"{_FP8}/pad-in-router"),
    ),
    "speed_heads": Choice(
        key="loss.head_chunk", values=("2048", "null"), arms=(_BF16, f"{_BF16}/whole-heads")
    ),
    "speed_recompute": Choice(
        key="execution.recompute",
        values=("[]", "[moe_act]"),
        arms=(_BF16, f"{_BF16}/recompute-act"),
    ),
    "speed_norm": Choice(
        key="execution.fused_residual_norm",
        values=("false", "true"),
        arms=(_BF16, f"{_BF16}/fused-residual-norm"),
    ),
    "speed_deterministic": Choice(
        key="execution.deterministic",
        values=("false", "true"),
        arms=(_BF16, f"{_BF16}/deterministic"),
    ),
    "speed_overlap": Choice(
        key="layout.overlap_expert_comm",
        values=("false", "true"),
        arms=(_BF16, f"{_BF16}/overlap"),
        exchange=True,
    ),
    "speed_wgrad": Choice(
        key="layout.delay_wgrad",
        values=("false", "true"),
        arms=(f"{_BF16}/overlap", f"{_BF16}/overlap-wgrad"),
        exchange=True,
    ),
    "speed_dispatcher": Choice(
        key="layout.dispatcher",
        values=("alltoall", "flex"),
        arms=(_BF16, f"{_BF16}/hybridep"),
        exchange=True,
    ),
}
"""Piece -> the choice that it measures."""

REHEARSED = Choice(
    key="optimizer.name",
    values=("muon", "adam"),
    arms=("torch-bf16-muon-mtp", "torch-bf16-adam-mtp"),
)
"""The choice of a rehearsal. It decides nothing."""


def measure(place: Workplace, piece: str) -> Outcome:
    """Measure the choice of a piece: first value, second, first again, one process each.

    A difference below that of the two runs of the first value is noise.
    """
    choice = CHOICES[piece]
    if place.rehearsal:
        if piece != next(iter(CHOICES)):
            raise SkipPiece("a rehearsal measures one pair only")
        choice = REHEARSED
    if place.checkout is None or not (place.checkout / BENCHMARK).is_file():
        raise SkipPiece("the benchmark is in a checkout of the repository, not in the package")
    if "fp8" in "".join(choice.arms) and place.machine["fp8"] is not None:
        raise SkipPiece(place.machine["fp8"])
    if choice.key == "execution.deterministic" and place.deterministic_lacks is not None:
        raise SkipPiece(place.deterministic_lacks)
    if choice.exchange and place.gpus < 2:
        raise SkipPiece(f"{place.gpus} GPU: an exchange needs two or more")
    lacking = missing_dispatcher("hybridep") if "hybridep" in choice.arms[1] else None
    if lacking is not None:
        raise SkipPiece(lacking)
    output = place.work / piece
    words = ["--small", "--warmup", "1", "--steps", "1"] if place.rehearsal else ["--tune"]
    if choice.exchange:
        # Experts are shared inside one node, by 2, 4 or 8 ranks.
        words += ["--ranks", str(min(8, 1 << (place.gpus.bit_length() - 1)))]
    first, second = choice.arms
    file = output / "results.json"
    file.unlink(missing_ok=True)  # of an earlier call
    said = place.run(
        piece,
        [
            *(sys.executable, "-m", "benchmarks.train_step", *words, "--output", str(output)),
            *("--arms", first, second, first),
        ],
        accepted=(0, 1),
    )
    if not file.is_file():
        raise PieceError(f"{piece}: the benchmark wrote no results: {cause(said)}")
    return judge(choice, load_json(file), rehearsal=place.rehearsal)


def judge(choice: Choice, results: dict[str, Any], *, rehearsal: bool = False) -> Outcome:
    """Return what the results of the benchmark say about a choice.

    Args:
        choice: the two arms that were measured.
        results: content of the benchmark's ``results.json``.
        rehearsal: true if the figures mean nothing, default false.
    """
    broken = [arm for arm in results["arms"] if arm["status"] == "failed"]
    if broken:
        raise PieceError(f"{broken[0]['arm']}: {broken[0]['reason']}")
    runs = [
        [arm for arm in results["arms"] if arm["arm"] == name and arm["status"] == "measured"]
        for name in choice.arms
    ]
    seconds = [statistics.median(arm["median_seconds"] for arm in arms) for arms in runs]
    gain = seconds[0] / seconds[1] - 1
    drift = results["drift"][choice.arms[0]]
    arms = {
        f"{choice.key}={value}": {
            "seconds a step": seconds[index],
            "tokens a second": runs[index][0]["tokens_per_second"],
            "model TFLOP/s": runs[index][0]["model_flops_per_second"] / 1e12,
            "share of the matrix product": runs[index][0]["share_of_gemm"],
            "peak memory": runs[index][0]["peak_memory_bytes"],
            "estimated memory": runs[index][0]["estimated_memory_bytes"],
            "least memory": runs[index][0]["least_memory_bytes"],
        }
        for index, value in enumerate(choice.values)
    }
    figures = {
        "layers": results["slice"]["layers"],
        "GPUs": results["slice"]["ranks"],
        "arms": arms,
        "gain of the second": gain,
        "drift of the first": drift,
        "matrix product TFLOP/s": results["gemm"]["flops_per_second"] / 1e12,
        "profile": runs[0][0]["profile"],
    }
    freed = runs[0][0]["peak_memory_bytes"] - runs[1][0]["peak_memory_bytes"]
    line = decision(choice, gain, drift, freed)
    return Outcome(status="passed", figures=figures, decides=() if rehearsal else (line,))


def decision(choice: Choice, gain: float, drift: float, freed: int) -> str:
    """Return the line on a setting that a measured pair of its values decides.

    Args:
        choice: setting and values.
        gain: speed of the second value over the first, minus 1.
        drift: relative difference of two runs of the first value.
        freed: bytes of peak memory that the second value takes less.
    """
    first, second = choice.values
    memory = f"and {size_text(abs(freed))} {'less' if freed >= 0 else 'more'} memory"
    if abs(gain) <= drift:
        return (
            f"`{choice.key}`: {first} and {second} are equally fast "
            f"(difference {gain:+.1%}, drift {drift:.1%}); {second} takes {memory[4:]}"
        )
    faster = second if gain > 0 else first
    return (
        f"`{choice.key}`: {faster} is faster; {second} has {gain:+.1%} speed "
        f"(drift {drift:.1%}) {memory}"
    )


def memory(place: Workplace) -> Outcome:
    """Compare the peak of each measured arm with the bounds of the estimate (`Memory.allocated`).

    The least has an even load of the experts and no transients. The most has both, and room for
    unequal experts. Both are of torch's allocator, without the buffers of libraries.
    """
    figures: dict[str, Any] = {}
    for piece in CHOICES:
        for name, arm in passed_figures(place.folder, piece).get("arms", {}).items():
            figures[f"{piece}: {name}"] = {
                "measured": arm["peak memory"],
                "least": arm["least memory"],
                "estimated": arm["estimated memory"],
                "ratio": arm["peak memory"] / arm["estimated memory"],
            }
    if not figures:
        raise SkipPiece("no arm has been measured")
    if place.rehearsal:
        # A process on a CPU holds Python and torch, which the estimate leaves out.
        return Outcome(status="passed", figures=figures)
    wrong = [
        name
        for name, row in figures.items()
        if not (1 - MARGIN) * row["least"] <= row["measured"] <= (1 + MARGIN) * row["estimated"]
    ]
    largest = max(row["ratio"] for row in figures.values())
    line = (
        "`schedule.micro_batch_size` and `execution.recompute`: measured memory is at most "
        f"{largest:.2f} times the estimate; `mellum2 doctor RECIPE --gpu NAME` counts with 1.00"
    )
    return Outcome(
        status="failed" if wrong else "passed",
        reason=f"measured memory is outside of its bounds by over {MARGIN:.0%}: {'; '.join(wrong)}"
        if wrong
        else "",
        figures=figures,
        decides=(line,),
    )
