"""Run the pieces of the check that have not passed yet, and keep each result at once."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import re
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, first_line, nearest
from mellum2_megatron.common.files import write_json, write_text
from mellum2_megatron.common.provenance import PACKAGES, project_root, source_code
from mellum2_megatron.gpu_check import correctness, hardware, page, speed
from mellum2_megatron.gpu_check.piece import (
    LIMIT,
    Outcome,
    Piece,
    PieceError,
    SkipPiece,
    Workplace,
    result_file,
    stored_result,
)

PIECES = (
    Piece(
        name="environment",
        title="Are the packages and kernels of the te backend here?",
        run=hardware.environment,
        limit=60,
    ),
    Piece(
        name="data",
        title="Is a small corpus prepared?",
        run=correctness.prepare_data,
        leaves="data",
        limit=120,
    ),
    Piece(
        name="train",
        title="Does te train in BF16 and save?",
        run=correctness.train,
        needs=("data",),
        leaves="straight",
        limit=240,
    ),
    Piece(
        name="resume",
        title="Does a resumed run repeat the steps of an uninterrupted one?",
        run=correctness.resume,
        needs=("train",),
        limit=240,
    ),
    Piece(
        name="deterministic",
        title="Does deterministic mode repeat every bit, resumed too?",
        run=correctness.deterministic,
        needs=("train",),
        limit=480,
    ),
    Piece(
        name="export",
        title="Has the exported model the logits of the checkpoint?",
        run=correctness.export,
        needs=("train",),
        limit=300,
    ),
    Piece(
        name="logits",
        title="Are te's BF16 logits as exact as torch's?",
        run=correctness.logits,
        needs=("train",),
        limit=300,
    ),
    Piece(
        name="backends",
        title="Have te and torch the same losses and gradient norms?",
        run=correctness.backends,
        needs=("train",),
        limit=240,
    ),
    Piece(
        name="fp8",
        title="Has FP8 the losses and gradient norms of BF16?",
        run=correctness.fp8,
        needs=("train",),
        limit=240,
    ),
    *(
        Piece(
            name=f"layouts_{part + 1}",
            title="Does each parallel layout equal one process, on NCCL?",
            run=functools.partial(hardware.layouts, part=part),
            limit=540,
        )
        for part in range(hardware.LAYOUT_PARTS)
    ),
    *(
        Piece(
            name=name,
            title=f"What does `{choice.key}` cost or bring?",
            run=functools.partial(speed.measure, piece=name),
            limit=480,
        )
        for name, choice in speed.CHOICES.items()
    ),
    Piece(
        name="memory",
        title="Is the measured memory the estimated one?",
        run=speed.memory,
        always=True,
        limit=10,
    ),
)
"""All pieces, in the order of their runs: what is exact comes before what is fast."""

_SOURCES = ("mellum2_megatron", "conversion", "launchers", "benchmarks", "tests/layouts")
"""Folders whose code a result belongs to."""


def run_pieces(
    output: Path,
    machine: dict[str, Any],
    *,
    rehearsal: bool,
    only: Sequence[str] = (),
    minutes: float | None = None,
    report: Callable[[str], None],
) -> tuple[Path, dict[str, Any]]:
    """Run what has not passed yet on this machine with this code, then write the page.

    Args:
        output: folder of all results; those of this machine and code get a folder in it.
        machine: facts of `machine.facts`.
        rehearsal: a tiny model on a CPU.
        only: names of the pieces to run, passed or not; empty (default): all that have not passed.
        minutes: start no piece that may take longer than what is left of it; None (default): run
            all.
        report: called with each line for the user.

    Returns:
        The folder of the results, and the content of its ``gpu_check.json``.

    Raises:
        InputError: no piece of a name in ``only``.
    """
    check_names(only)
    code = source_code()
    root = project_root()
    folder = output / folder_name(machine, root, rehearsal=rehearsal)
    folder.mkdir(parents=True, exist_ok=True)
    checkout = root if (root / "benchmarks").is_dir() else None
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for piece in PIECES:
        place = Workplace(
            # Commands run in the checkout, so a relative path would mean another folder there.
            folder=folder.resolve(),
            rehearsal=rehearsal,
            machine=machine,
            checkout=checkout,
            # Login nodes and laptops, where rehearsals run, may be busy.
            deadline=time.monotonic() + (LIMIT if rehearsal else piece.limit),
        )
        chosen = piece.name in only
        if not chosen and (only or _has_passed(place, piece)) and not piece.always:
            continue
        if end is not None and time.monotonic() + piece.limit > end and not piece.always:
            report(f"left    {piece.name}: may take {piece.limit / 60:.0f} minutes")
            continue
        if not piece.always:
            report(f"running {piece.name}: {piece.title}")
        result = _run(place, piece)
        write_json(result_file(folder, piece.name), result)
        report(f"{result['status']:7} {piece.name} {result['reason']}".rstrip())
    return folder, page.write(folder, PIECES, machine=machine, code=code, rehearsal=rehearsal)


def check_names(names: Sequence[str]) -> None:
    """Refuse names that no piece has.

    Raises:
        InputError: there is such a name.
    """
    known = [piece.name for piece in PIECES]
    for name in names:
        if name not in known:
            raise InputError(
                f"--only {name}",
                rule="there is no such piece",
                fix=nearest(name, known),
            )


def check_minutes(minutes: float | None, names: Sequence[str]) -> None:
    """Refuse a time in which a piece would never begin.

    Args:
        minutes: time of a call; None: no limit.
        names: pieces that all run in this call; empty: those that have not passed, in as many
            calls as they need.

    Raises:
        InputError: the largest piece, or all that are named, may take longer.
    """
    if minutes is None:
        return
    limits = {piece.name: piece.limit for piece in PIECES if not piece.always}
    if names:
        what, seconds = (
            " and ".join(dict.fromkeys(names)),
            sum(limits.get(n, 0) for n in set(names)),
        )
    else:
        what = max(limits, key=limits.__getitem__)
        seconds = limits[what]
    if 60 * minutes <= seconds:
        raise InputError(
            f"--minutes {minutes:g}",
            rule=f"{what} may take {seconds / 60:g} minutes, and would never begin",
            fix=f"use --minutes {seconds // 60 + 1:g}, or leave it out",
        )


def folder_name(machine: dict[str, Any], root: Path, *, rehearsal: bool) -> str:
    """Return the folder name of the results of a machine, its packages and this code.

    Another number or kind of GPUs, another version of a package or another line of code makes
    another folder.
    """
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    digest = hashlib.sha256(json.dumps([machine, versions, rehearsal], sort_keys=True).encode())
    for file in sorted(path for top in _SOURCES for path in (root / top).rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    names = [gpu["name"] for gpu in machine["gpus"]]
    label = f"{len(names)}x_{names[0]}" if names else "rehearsal"
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', label).lower()}_{digest.hexdigest()[:10]}"


def _has_passed(place: Workplace, piece: Piece) -> bool:
    """Return true if a piece has passed, and what it leaves for others is still there."""
    stored = stored_result(place.folder, piece.name)
    if stored is None or stored["status"] != "passed":
        return False
    return not piece.leaves or (place.work / piece.leaves).exists()


def _run(place: Workplace, piece: Piece) -> dict[str, Any]:
    """Run a piece and return its result, a failure too."""
    start = time.monotonic()
    by_name = {other.name: other for other in PIECES}
    missing = [name for name in piece.needs if not _has_passed(place, by_name[name])]
    try:
        if missing:
            raise SkipPiece(f"needs {missing[0]}, which has not passed")
        outcome = piece.run(place)
    except SkipPiece as skipped:
        outcome = Outcome(status="skipped", reason=str(skipped))
    except PieceError as error:
        outcome = Outcome(status="failed", reason=str(error))
    except Exception as error:  # a fault of one piece costs neither the others nor the page
        file = place.folder / "logs" / f"{piece.name}.traceback"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, traceback.format_exc())
        reason = f"{type(error).__name__}: {first_line(error)} (see {file})"
        outcome = Outcome(status="failed", reason=reason)
    result: dict[str, Any] = _finite(asdict(outcome))
    return result | {"seconds": time.monotonic() - start}


def _finite(value: Any) -> Any:
    """Return a value with null for each number that is none, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
