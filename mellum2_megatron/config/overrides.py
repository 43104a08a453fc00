"""Overrides ``a.b=c``: strict, and typed by the field that they set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.values import field_types, from_text
from mellum2_megatron.config.run import Run, keys


def apply_overrides(run: Run, overrides: Sequence[str]) -> Run:
    """Return ``run`` with every ``key=value`` applied, later ones winning, then validated as a
    whole.

    Keys are the full names of fields (``layout.ep``, ``schedule.batch_schedule``); see
    ``values.from_text`` for how values are written. ``architecture=PRESET`` exchanges the whole
    model, whatever its position in the list. Two fields of the architecture follow the one that
    they describe unless they are given too (``Mellum2Architecture.replace``): with
    ``architecture.num_hidden_layers`` the repeating pattern of ``layer_types`` is continued or cut,
    and with ``architecture.num_mtp_layers`` the MTP layers slide.

    An overridden key's source becomes the override itself.

    Raises:
        InputError: not ``key=value``, an unknown key (the nearest is named), a value of the wrong
            type (the expected one is named), or a combination that the run refuses.
    """
    pairs = [_split(override) for override in overrides]
    changes: dict[str, Any] = {}
    sources = dict(run.sources)
    for key, text in pairs:
        if key == "architecture":
            run = dataclasses.replace(run, architecture=Mellum2Architecture.preset(text))
            sources = {
                known: source
                for known, source in sources.items()
                if not f"{known}.".startswith("architecture.")
            }
            sources["architecture"] = f"override architecture={text}"
    for key, text in pairs:
        if key != "architecture":
            _set(changes, key, from_text(text, _annotation(key), key))
            sources[key] = f"override {key}={text}"
    resolved: Run = _replace(run, {**changes, "sources": sources})
    return resolved


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(
            override,
            rule="an override is KEY=VALUE",
            fix="write it like layout.ep=8, without blanks",
        )
    key = key.strip()
    if key != "architecture" and key not in keys():
        raise InputError(override, rule=f"there is no key {key!r}", fix=_nearest_key(key))
    return key, text.strip()


def _nearest_key(key: str) -> str:
    """Return the fix for an unknown key: a section's keys, fields of that name elsewhere, or the
    closest key."""
    known = keys()
    inside = [candidate for candidate in known if candidate.startswith(f"{key}.")]
    if inside:
        return f"set one of its fields: {', '.join(inside)}"
    same_field = [
        candidate for candidate in known if candidate.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    if same_field:
        return f"did you mean {' or '.join(map(repr, same_field))}"
    section = key.partition(".")[0]
    fields = [
        candidate.partition(".")[2] for candidate in known if candidate.startswith(f"{section}.")
    ]
    return nearest(key, known) + (f" ({section} has {', '.join(fields)})" if fields else "")


def _annotation(key: str) -> Any:
    annotation: Any = Run
    for name in key.split("."):
        annotation = field_types(annotation)[name]
    return annotation


def _set(changes: dict[str, Any], key: str, value: Any) -> None:
    *path, name = key.split(".")
    for part in path:
        changes = changes.setdefault(part, {})
    changes[name] = value


def _replace(instance: Any, changes: Mapping[str, Any]) -> Any:
    """Rebuild nested dataclasses from the inside out, so that values changed together are validated
    together."""
    fields = {
        name: _replace(getattr(instance, name), change)
        if dataclasses.is_dataclass(getattr(instance, name))
        else change
        for name, change in changes.items()
    }
    if isinstance(instance, Mellum2Architecture):
        return instance.replace(**fields)
    return dataclasses.replace(instance, **fields)
