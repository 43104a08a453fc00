"""Pieces about the machine: its packages and kernels, and parallel layouts on its GPUs."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree

from mellum2_megatron.gpu_check.piece import Outcome, SkipPiece, Workplace
from mellum2_megatron.planning.optional_packages import find_optional_packages

LAYOUT_TESTS = "tests/layouts/test_layouts.py"

_REHEARSED = f"{LAYOUT_TESTS}::test_layout_equals_one_process[gloo-ep2]"
"""The layout of a rehearsal."""

LAYOUT_PARTS = 6
"""Number of pieces that the layout tests are cut into, some six layouts each. On 8 GPUs twelve in a
row might not end in a piece's time, and a piece that is ended keeps none of its results."""


def environment(place: Workplace) -> Outcome:
    """List GPUs, versions and packages; kernels that the te backend calls must be there."""
    packages = {
        package.name: f"{package.state}: {package.detail}" for package in find_optional_packages()
    }
    figures = {"packages": packages, **place.machine}
    if place.rehearsal:
        return Outcome(status="passed", figures=figures)
    if place.machine["transformer_engine"] is None:
        error = place.machine["transformer_engine_error"]
        reason = f"Transformer Engine cannot be imported ({error}): make setup-te"
        return Outcome(status="failed", reason=reason, figures=figures)
    missing = [name for name, there in place.machine["kernels"].items() if not there]
    decides = []
    if place.machine["fp8"] is not None:
        decides.append(f"`precision.compute`: bf16, for FP8 does not work ({place.machine['fp8']})")
    return Outcome(
        status="failed" if missing else "passed",
        reason=f"Transformer Engine has no kernel for: {', '.join(missing)}" if missing else "",
        figures=figures,
        decides=tuple(decides),
    )


def layouts(place: Workplace, part: int) -> Outcome:
    """Run a part of the layout tests on NCCL: layouts of as many ranks as there are GPUs, or fewer.

    Args:
        place: the machine.
        part: number of the part, from 0 to `LAYOUT_PARTS`.
    """
    if place.rehearsal and part:
        raise SkipPiece("a rehearsal runs one layout only")
    if place.checkout is None or not (place.checkout / LAYOUT_TESTS).is_file():
        raise SkipPiece("the tests are in a checkout of the repository, not in the package")
    variables = {"PYTHONPATH": str(place.checkout), "OMP_NUM_THREADS": "1"}
    # No cache: the checkout may be on a disk that this user cannot write.
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    selected = [_REHEARSED]
    if not place.rehearsal:
        listed = place.run(
            "layouts_list",
            [*pytest, LAYOUT_TESTS, "--collect-only", "-m", "gpu"],
            environment=variables,
        )
        names = [line for line in listed.splitlines() if line.startswith(f"{LAYOUT_TESTS}::")]
        selected = names[part::LAYOUT_PARTS]
    report = place.folder / f"layouts_{part + 1}.xml"
    place.run(
        f"layouts_{part + 1}",
        [*pytest, f"--junitxml={report}", *selected],
        accepted=(0, 1),
        environment=variables,
    )
    cases = list(ElementTree.parse(report).iter("testcase"))
    by_result: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in cases:
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "passed"
        name = str(case.get("name")).partition("[")[2].removesuffix("]")
        by_result["skipped" if "skipped" in kinds else result].append(name)
    if not by_result["passed"] and not by_result["failed"]:
        raise SkipPiece(f"{place.gpus} GPU(s): no layout fits")
    wrong = by_result["failed"]
    return Outcome(
        status="failed" if wrong else "passed",
        reason=f"differ from one process: {', '.join(wrong)}" if wrong else "",
        figures={result: names for result, names in by_result.items() if names},
    )
