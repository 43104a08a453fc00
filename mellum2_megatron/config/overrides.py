"""Overrides ``a.b=c``: unknown keys are refused, values converted to the field's type."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.values import field_types, from_text
from mellum2_megatron.config.run import Run, keys


def apply_overrides(run: Run, overrides: Sequence[str]) -> Run:
    """Return ``run`` with every ``key=value`` applied, then validated as a whole.

    Args:
        run: the run, left unchanged.
        overrides: full keys (``layout.ep``) with values as in `from_text`; later ones win.
            ``architecture=PRESET`` exchanges the whole model; it is applied first, at any position
            in the list. Layer types follow ``architecture.num_hidden_layers`` and
            ``architecture.num_mtp_layers``, see `Mellum2Architecture.replace`.

    Returns:
        A new run. The source of an overridden key is the override itself.

    Raises:
        InputError: not ``key=value``, an unknown key (the nearest is named), a value of the wrong
            type (the expected one is named), or a combination that the run refuses.
    """
    pairs = [_split(override) for override in overrides]
    sources = dict(run.sources)
    # Presets first: they replace the fields that the other overrides change.
    for key, text in pairs:
        if key == "architecture":
            run = dataclasses.replace(run, architecture=Mellum2Architecture.preset(text))
            # The old model's sources do not hold for the new one. The dot matches whole names,
            # the section's own source included.
            sources = {
                sourced: source
                for sourced, source in sources.items()
                if not f"{sourced}.".startswith("architecture.")
            }
            sources["architecture"] = f"override architecture={text}"
    # A tree of changes, applied at once: values that fit only together pass the checks.
    changes: dict[str, Any] = {}
    for key, text in pairs:
        if key != "architecture":
            *sections, name = key.split(".")
            annotation, section = field_types(Run), changes
            for part in sections:
                annotation, section = field_types(annotation[part]), section.setdefault(part, {})
            section[name] = from_text(text, annotation[name], key)
            sources[key] = f"override {key}={text}"
    resolved: Run = _replace(run, {**changes, "sources": sources})
    return resolved


def _split(override: str) -> tuple[str, str]:
    """Return key and value text of an override; refuse an unknown key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(
            override,
            rule="an override is KEY=VALUE",
            fix="write it like layout.ep=8, without blanks",
        )
    known = keys()
    if key == "architecture" or key in known:
        return key, text.strip()
    # Most likely first: a section without its field, a field without its section, a typo.
    section, name = key.partition(".")[0], key.rpartition(".")[2]
    inside = [candidate for candidate in known if candidate.startswith(f"{key}.")]
    same_name = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    if inside:
        fix = f"set one of its fields: {', '.join(inside)}"
    elif same_name:
        fix = f"did you mean {' or '.join(map(repr, same_name))}"
    else:
        fields = [
            candidate.removeprefix(f"{section}.")
            for candidate in known
            if candidate.startswith(f"{section}.")
        ]
        fix = nearest(key, known)
        if fields:
            fix += f" ({section} has {', '.join(fields)})"
    raise InputError(override, rule=f"there is no key {key!r}", fix=fix)


def _replace(instance: Any, changes: Mapping[str, Any]) -> Any:
    """Rebuild nested dataclasses from the inside out, each one once.

    Values that are changed together are therefore validated together.
    """
    fields = {
        name: _replace(getattr(instance, name), change)
        if dataclasses.is_dataclass(getattr(instance, name))
        else change
        for name, change in changes.items()
    }
    # The architecture's own `replace` adapts the layer types to a new number of layers.
    if isinstance(instance, Mellum2Architecture):
        return instance.replace(**fields)
    return dataclasses.replace(instance, **fields)
