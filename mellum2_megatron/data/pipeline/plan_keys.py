"""Every key of a corpus plan and its place: for the reference, and for keys at a wrong place.

The ``Attributes`` of the plan's classes are the only place where a key is described. The table in
``docs/corpus_plans.md`` is made from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from mellum2_megatron.common.values import describe, field_types, to_plain
from mellum2_megatron.config.key_reference import attribute_texts
from mellum2_megatron.data.corpus.near_duplicates import NearDuplicateSettings
from mellum2_megatron.data.pipeline.plan import FILTERS, Phase, Plan, Source
from mellum2_megatron.data.tokens.fill_in_middle import FimSettings
from mellum2_megatron.data.tokens.repository import RepositorySettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A place of a plan that has keys.

    Attributes:
        name: name in words.
        path: keys around it with a dot at the end, as messages write them: ``phases.1.``.
        keys: class whose fields are its keys.
    """

    name: str
    path: str
    keys: type

    @property
    def pattern(self) -> tuple[str, ...]:
        """Keys around it; a word in capitals or a number is any name or number."""
        return tuple(self.path.split(".")[:-1])


_FILTERS = tuple(
    dict.fromkeys(type(one) for filters in FILTERS.values() for one in filters)  # once each
)

PLACES = (
    Place(name="the top of the plan", path="", keys=Plan),
    Place(
        name="`near_duplicates` at the top of the plan",
        path="near_duplicates.",
        keys=NearDuplicateSettings,
    ),
    Place(name="a source", path="sources.NAME.", keys=Source),
    *(
        Place(
            name=f"`filters` of a source, {one.__name__}",
            path=f"sources.NAME.filters.{one.__name__}.",
            keys=one,
        )
        for one in _FILTERS
    ),
    Place(name="a phase", path="phases.1.", keys=Phase),
    Place(name="`fim` of a phase", path="phases.1.fim.", keys=FimSettings),
    Place(
        name="`repository` of a phase, for each source",
        path="phases.1.repository.SOURCE.",
        keys=RepositorySettings,
    ),
)
"""All places, in the order of a plan."""


def right_place(key: str) -> str | None:
    """Return the fix for a key that a plan does not have at this place.

    Args:
        key: full key as it was given, such as ``fim`` or ``phases.2.rate``.

    Returns:
        The places that have a key of this name, or of a name that is close to it; None where the
        key's own place has a closer one, or none has.
    """
    given, _, name = key.rpartition(".")
    homes: dict[str, list[tuple[str, str]]] = {}
    for place in PLACES:
        for known in field_types(place.keys):
            homes.setdefault(known, []).append((place.name, f"{place.path}{known}"))
    for filter_name in (one.__name__ for one in _FILTERS):
        homes[filter_name] = [("`filters` of a source", f"sources.NAME.filters.{filter_name}")]
    if name in homes:
        return f"{name} belongs to {_listed(homes[name])}"
    here = [
        known
        for place in PLACES
        if _fits(given.split(".") if given else [], place.pattern)
        for known in field_types(place.keys)
    ]
    if get_close_matches(name, here, n=1, cutoff=0.6):
        return None
    (*close,) = get_close_matches(name, homes, n=1, cutoff=0.75)
    return f"did you mean {close[0]!r}, of {_listed(homes[close[0]])}" if close else None


def _listed(homes: Iterable[tuple[str, str]]) -> str:
    return ", or to ".join(f"{place} ({path})" for place, path in homes)


def _fits(keys: list[str], pattern: tuple[str, ...]) -> bool:
    """Return true if ``keys`` lead to the place of a pattern."""
    return len(keys) == len(pattern) and all(
        word.isupper() or word.isdigit() or word == key
        for key, word in zip(keys, pattern, strict=True)
    )


def plan_keys_table() -> str:
    """Return the reference of all keys in Markdown: a table for each place."""
    lines: list[str] = []
    for place in PLACES:
        title = place.name.removeprefix("the ")
        lines += ["", f"### {title[0].upper()}{title[1:]}", ""]
        lines += ["| Key | Value | Default | Meaning |", "|---|---|---|---|"]
        texts = attribute_texts(place.keys)
        for field in dataclasses.fields(place.keys):
            annotation = field_types(place.keys)[field.name]
            cells = (
                f"`{place.path}{field.name}`",
                _kind(annotation),
                _default(field),
                texts[field.name].replace("``", "`"),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).strip() + "\n"


def _kind(annotation: Any) -> str:
    """Return a key's values in words; those with keys of their own have a table below."""
    words = describe(annotation).replace("a mapping of keys to values", "keys")
    return words.replace(" (empty: {})", "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = to_plain(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        value = to_plain(field.default_factory())
        # Each key of a section has its default in the section's own table.
        value = value if not isinstance(value, Mapping) else {}
    else:
        return "needed"
    spelt = {"None": "null", "True": "true", "False": "false"}
    return f"`{spelt.get(str(value), value)}`"
