"""Measures planned, run and reported: `plan` before the model is loaded, `evaluate` with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError, nearest, shown
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.provenance import software
from mellum2_megatron.common.values import field_types, from_text
from mellum2_megatron.evaluation.contamination import Overlap
from mellum2_megatron.evaluation.measure import Measure, Outcome
from mellum2_megatron.evaluation.model import EvaluatedModel
from mellum2_megatron.evaluation.registry import MEASURES, SUITES

FORMAT = 1
"""Version of the JSON file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A measure with its settings."""

    measure: Measure[Any]
    settings: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Results of one model.

    Attributes:
        model: path of the model, as given.
        suites: suites that were asked for.
        results: each measure with its settings and its outcome, in order.
        overlaps: what the items share with the training data; None (default): not looked for.
    """

    model: str
    suites: tuple[str, ...]
    results: tuple[tuple[Planned, Outcome], ...]
    overlaps: tuple[Overlap, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: figures, settings with their seeds, and versions of the software."""
        return {
            "format": FORMAT,
            "model": self.model,
            "suites": list(self.suites),
            **software(),
            "overlaps": None
            if self.overlaps is None
            else [asdict(overlap) for overlap in self.overlaps],
            "measures": [
                {
                    "name": planned.measure.name,
                    "version": planned.measure.version,
                    "settings": asdict(planned.settings),
                    **asdict(outcome),
                }
                for planned, outcome in self.results
            ],
        }

    def write(self, path: Path) -> None:
        """Write `to_dict` to a JSON file, atomically."""
        write_json(path, self.to_dict())


def plan(
    architecture: Mellum2Architecture, suites: Sequence[str], overrides: Sequence[str] = ()
) -> tuple[Planned, ...]:
    """Return the measures of suites with their settings, checked against a model.

    Args:
        architecture: the model.
        suites: keys of `SUITES`, or of `MEASURES` for one alone.
        overrides: ``MEASURE.SETTING=VALUE``, such as ``needle.lengths=[512,1024]``.

    Raises:
        InputError: an unknown suite, measure or setting, a value of another type, or one that does
            not fit the model, such as a context longer than its own.
    """
    names: list[str] = []
    for suite in suites:
        if suite not in SUITES and suite not in MEASURES:
            raise InputError(
                f"--suite {suite}",
                rule="there is no such suite or measure",
                fix=nearest(suite, [*SUITES, *MEASURES]),
            )
        names += SUITES.get(suite, (suite,))
    settings = {name: MEASURES[name].settings() for name in dict.fromkeys(names)}
    for override in overrides:
        name, setting, text = _split(override, settings)
        annotation = field_types(type(settings[name]))[setting]
        value = from_text(text, annotation, f"{name}.{setting}")
        settings[name] = replace(settings[name], **{setting: value})
    planned = tuple(
        Planned(measure=MEASURES[name], settings=value) for name, value in settings.items()
    )
    for one in planned:
        one.measure.check(architecture, one.settings)
    return planned


def evaluate(
    model: EvaluatedModel,
    planned: Sequence[Planned],
    *,
    name: str,
    suites: Sequence[str],
    announce: Callable[[str], None] = lambda _name: None,
) -> Report:
    """Run measures one after the other.

    Args:
        model: the model.
        planned: measures from `plan`.
        name: path of the model, for the report.
        suites: suites that were asked for, for the report.
        announce: called with the name of each measure before it runs; default: nothing is said.
    """
    results = []
    for one in planned:
        announce(one.measure.name)
        results.append((one, one.measure.run(model, one.settings)))
    return Report(model=name, suites=tuple(suites), results=tuple(results))


def longest_text(architecture: Mellum2Architecture, planned: Sequence[Planned]) -> int:
    """Return the tokens of the longest text that a model reads at once; 1 if all are short."""
    return max(
        (
            one.measure.longest(architecture, one.settings)
            for one in planned
            if one.measure.longest is not None
        ),
        default=1,
    )


def item_texts(planned: Sequence[Planned]) -> dict[str, Sequence[str]]:
    """Return the texts of the items of each measure that has such, by its name."""
    return {
        one.measure.name: one.measure.texts(one.settings)
        for one in planned
        if one.measure.texts is not None
    }


def _split(override: str, settings: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return measure, setting and value text of an override; refuse unknown names."""
    key, equals, text = override.partition("=")
    known = [
        f"{name}.{field}" for name, value in settings.items() for field in field_types(type(value))
    ]
    if not equals:
        raise InputError(
            shown(override, quote=False),
            rule="a setting is MEASURE.SETTING=VALUE",
            fix="write it like needle.items=20, without blanks",
        )
    if key not in known:
        raise InputError(
            shown(override, quote=False),
            rule=f"the measures of this suite have no setting {shown(key)}",
            fix=nearest(key, known),
        )
    name, _, setting = key.partition(".")
    return name, setting, text
