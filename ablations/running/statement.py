"""What a study stated before its runs: a report says what has changed since.

::

    RESULTS/STUDY/SCALE/stated.json     written by the first `mellum2 ablate run` of the study
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ablations.asking.study import Study
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.json_files import read_record
from mellum2_megatron.common.values import to_plain

STATED_FILE = "stated.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """Parts of a study that could be fitted to its results.

    Attributes:
        time: time of the statement, ISO 8601, UTC.
        control: name of the control.
        metrics: delta of each metric, the deciding one first.
        seeds: looks.
        arms: names of the arms.
        expected: outcomes that the claim predicts, by arm.
    """

    time: str
    control: str
    metrics: dict[str, float]
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    expected: dict[str, str]

    @classmethod
    def of(cls, study: Study, *, time: str = "") -> Statement:
        """Return the statement of a study, made now by default."""
        return cls(
            time=time or datetime.now(UTC).isoformat(timespec="seconds"),
            control=study.control,
            metrics={metric.name: float(metric.delta) for metric in study.metrics},
            seeds=tuple(study.seeds),
            arms=tuple(arm.name for arm in study.arms),
            expected=dict(study.claim.expected) if study.claim else {},
        )


def state(study: Study, folder: Path) -> None:
    """Write the statement of a study into its folder, unless one is there."""
    if not (folder / STATED_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STATED_FILE, to_plain(Statement.of(study)))


def read_statement(folder: Path) -> Statement | None:
    """Return the statement in a study's folder; None without one.

    Raises:
        InputError: the file is damaged.
    """
    return read_record(
        Statement,
        folder / STATED_FILE,
        what="statement of a study",
        fix="delete it; reports then say that nothing shows what was stated before the runs",
    )


def statement_notes(study: Study, stated: Statement | None, started: Sequence[str]) -> list[str]:
    """Return sentences about what a study states now and did not when its runs began.

    Args:
        study: the study now.
        stated: its statement; None: there is none.
        started: start times of its runs, ISO 8601, UTC; empty texts are unknown.
    """
    if not started:
        return []
    if stated is None:
        return [
            "Nothing shows that metrics, deltas and looks were stated before the runs "
            f"({STATED_FILE})."
        ]
    notes = []
    before, now = to_plain(stated), to_plain(Statement.of(study, time=stated.time))
    changes = [
        f"{key} {_text(before[key])} -> {_text(now[key])}"
        for key in before
        if before[key] != now[key] or list(before[key]) != list(now[key])
    ]
    if changes:
        notes.append(
            f"The study has changed since {stated.time}, when its runs began: {'; '.join(changes)}."
        )
    earlier = sum(bool(time) and time < stated.time for time in started)
    if earlier:
        notes.append(
            f"{earlier} of the {len(started)} runs began before the study was stated "
            f"({stated.time}): results that were known may have shaped it."
        )
    return notes


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
