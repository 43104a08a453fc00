"""Reading of a plan file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, keyed, shown
from mellum2_megatron.common.field_checks import require_text
from mellum2_megatron.common.files import read_text
from mellum2_megatron.common.text import read_yaml
from mellum2_megatron.common.values import from_mapping, from_plain
from mellum2_megatron.data.corpus.near_duplicates import NearDuplicateSettings
from mellum2_megatron.data.phase_record import PLAN_FILE
from mellum2_megatron.data.pipeline.inputs import HASHES_FILE
from mellum2_megatron.data.pipeline.plan import Phase, Plan, Source
from mellum2_megatron.data.pipeline.plan_keys import right_place
from mellum2_megatron.data.tokens.repository import RepositorySettings

DOCUMENT = "corpus plan"


def read_plan(path: Path) -> Plan:
    """Read a plan file. Relative paths in it start at the file's own folder.

    Raises:
        InputError: the file cannot be read, or says something that no plan can; each names it.
    """
    text = read_text(path, str(path), fix="name a plan file (docs/corpus_plans.md has an example)")
    with faults_of(path):
        return _plan_of(text, path)


def results_folder(file: Path) -> Path:
    """Return the folder of a plan's results; of the copy of a plan in them, that folder.

    Raises:
        InputError: see `read_plan`.
    """
    # The copy's relative paths start elsewhere.
    if file.name == PLAN_FILE and (file.parent / HASHES_FILE).is_file():
        return file.parent
    return Path(read_plan(file).output or "")


@contextmanager
def faults_of(file: Path) -> Iterator[None]:
    """Put the name of a plan's file in front of the refused values of a block, options apart."""
    try:
        yield
    except InputError as error:
        if error.value.startswith("--"):
            raise
        raise InputError(f"{file}: {error.value}", rule=error.rule, fix=error.fix) from None


def _plan_of(text: str, path: Path) -> Plan:
    values = read_yaml(text, document=DOCUMENT, fix="correct the line")
    plan = from_mapping(
        Plan,
        values,
        document=DOCUMENT,
        readers={"sources": _sources, "phases": _phases, "near_duplicates": _near_duplicates},
        right_place=right_place,
    )
    base = path.resolve().parent

    def absolute(key: str, name: str) -> str:
        require_text(key, name)
        # Not Path.expanduser, which fails for an unknown user; ~nobody is then no such folder.
        return str(base / os.path.expanduser(name))

    plan = replace(
        plan,
        tokenizer=absolute("tokenizer", plan.tokenizer),
        output=absolute("output", path.stem if plan.output is None else plan.output),
        sources={
            name: replace(
                source,
                inputs=tuple(absolute(f"sources.{name}.inputs", given) for given in source.inputs),
            )
            for name, source in plan.sources.items()
        },
    )
    _check_output(plan, path)
    return plan


def _check_output(plan: Plan, file: Path) -> None:
    """Refuse results inside an input, and around or in what the plan is made from.

    The next run would read them as text; and a plan replaces and removes folders of its output.
    """
    output = Path(os.path.realpath(plan.output or ""))
    own = {
        f"the plan {file}": file,
        f"tokenizer={plan.tokenizer}": Path(plan.tokenizer),
        **{
            f"sources.{name}.inputs: {given}": Path(given)
            for name, source in plan.sources.items()
            for given in source.inputs
        },
    }
    for name, place in own.items():
        if Path(os.path.realpath(place)).is_relative_to(output):
            raise InputError(
                f"output={plan.output}",
                rule=f"{name} lies in it, and a plan replaces and removes folders there",
                fix="give an `output` of its own",
            )
    for name, source in plan.sources.items():
        for given in source.inputs:
            if output.is_relative_to(os.path.realpath(given)):
                raise InputError(
                    f"output={plan.output}",
                    rule=f"it lies inside sources.{name}.inputs: {given}, and the next run would "
                    "read the results as text",
                    fix="give an `output` elsewhere, or name the folders of the texts",
                )


def _sources(values: Any, key: str) -> Mapping[str, Source]:
    if not isinstance(values, Mapping):
        raise InputError(
            f"{key}: {shown(values)}", rule="must be a mapping", fix="NAME: {kind: code}"
        )
    return {
        str(name): _named(
            Source,
            value,
            f"{key}.{name}",
            {"filters": _filters, "near_duplicates": _drops_near_duplicates},
        )
        for name, value in values.items()
    }


def _filters(values: Any, key: str) -> Mapping[str, Mapping[str, float] | None]:
    if not isinstance(values, Mapping):
        raise InputError(f"{key}: {shown(values)}", rule="must be a mapping", fix="LineLength: {}")
    return {
        name: from_plain(thresholds, Mapping[str, float] | None, f"{key}.{name}")
        for name, thresholds in values.items()
    }


def _near_duplicates(values: Any, key: str) -> NearDuplicateSettings:
    if not isinstance(values, Mapping):
        raise InputError(
            f"{key}: {shown(values)}",
            rule="at the top of a plan it is the shape of the search",
            fix="sources.NAME.near_duplicates switches the search off",
        )
    return _named(NearDuplicateSettings, values, key, {})


def _drops_near_duplicates(value: Any, key: str) -> bool:
    if isinstance(value, Mapping):
        raise InputError(
            f"{key}: {shown(dict(value))}",
            rule="in a source it is true or false",
            fix="the shape of the search is `near_duplicates` at the top of the plan",
        )
    drops: bool = from_plain(value, bool, key)
    return drops


def _phases(values: Any, key: str) -> tuple[Phase, ...]:
    if not isinstance(values, list):
        raise InputError(f"{key}: {shown(values)}", rule="must be a list", fix="- tokens: 1000000")
    return tuple(
        _named(Phase, value, f"{key}.{number}", {"repository": _repository})
        for number, value in enumerate(values, start=1)
    )


def _repository(values: Any, key: str) -> Mapping[str, RepositorySettings]:
    if not isinstance(values, Mapping):
        raise InputError(f"{key}: {shown(values)}", rule="must be a mapping", fix="code: {}")
    return {
        str(name): _named(RepositorySettings, value, f"{key}.{name}", {})
        for name, value in values.items()
    }


def _named[T](
    cls: type[T], values: Any, key: str, readers: Mapping[str, Callable[[Any, str], Any]]
) -> T:
    """Build a dataclass; a fault of its own checks gets the full key in front."""
    full = {f"{key}.{name}": reader for name, reader in readers.items()}
    with keyed(key):
        return from_mapping(
            cls, values, document=DOCUMENT, key=key, readers=full, right_place=right_place
        )
