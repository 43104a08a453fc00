"""The record of one phase of a corpus plan: what `data.path` and `data.phase` name together.

::

    PLAN/plan.yaml             copy of the plan
    PLAN/phase-1/phase.json    sequence length, sequences, share of each source
    PLAN/phase-1/SOURCE/       a folder of packs (`data.tokens.pack_files`) for each source
    PLAN/tokenizer/
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.common.values import from_mapping

PHASE_FILE = "phase.json"
PLAN_FILE = "plan.yaml"
"""Copy of the plan in the folder of its results."""

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseRecord:
    """A phase that has been packed.

    Attributes:
        plan: name of the corpus.
        phase: number of the phase, from 1.
        sequence_length: tokens of a sequence.
        samples: sequences of the phase.
        shares: percentage of each source.
        packs: training packs of each source, as many as the phase needs or more.
        content: hash of the results that all phases of the plan are made of; empty (default) in
            folders of earlier versions.
        format: version of this record.
    """

    plan: str
    phase: int
    sequence_length: int
    samples: int
    shares: dict[str, float]
    packs: dict[str, int]
    content: str = ""
    format: int = FORMAT


def phase_folder(plan: str | Path, phase: int) -> Path:
    """Return the folder of a phase in a plan's folder."""
    return Path(plan) / f"phase-{phase}"


def read_phase(plan: str | Path, phase: int) -> PhaseRecord:
    """Read the record of a phase.

    Raises:
        InputError: the folder is no plan's, the phase is missing or not packed yet, its record is
            damaged, or another phase is of another version of the plan.
    """
    file = phase_folder(plan, phase) / PHASE_FILE
    given = f"data.path={plan} data.phase={phase}"
    packed = packed_phases(plan)
    if not file.is_file():
        raise InputError(
            given,
            rule=f"there is no {file}; packed are {', '.join(map(str, packed)) or 'no'} phases",
            fix="run the plan with `mellum2 data run PLAN.yaml`, and name its folder in data.path; "
            "a folder of `mellum2 data prepare` needs data.phase=null",
        )
    record = _read(file)
    for number in packed:
        other = phase_folder(plan, number) / PHASE_FILE
        if number != phase and _read(other).content != record.content:
            # A killed `data run` was between the renames of two phases.
            raise InputError(
                given,
                rule=f"{other.parent.name} is of another version of the plan, so the two may share "
                "documents",
                fix="run the plan again",
            )
    return record


def packed_phases(plan: str | Path) -> list[int]:
    """Return the numbers of the phases that are packed, in order."""
    names = (path.parent.name for path in Path(plan).glob(f"phase-*/{PHASE_FILE}"))
    numbers = (name.removeprefix("phase-") for name in names)
    return sorted(int(number) for number in numbers if number.isascii() and number.isdigit())


def _read(file: Path) -> PhaseRecord:
    try:
        values = load_json(file)
        record = from_mapping(PhaseRecord, values, document="phase record")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            str(file), rule=f"it is damaged ({first_line(error)})", fix="run the plan again"
        ) from error
    if record.format != FORMAT:
        raise InputError(
            str(file),
            rule=f"its format is {record.format}, this version reads {FORMAT}",
            fix="run the plan again",
        )
    return record
