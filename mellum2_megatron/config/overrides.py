"""Overrides ``a.b=c``: unknown keys are refused, values converted to the field's type."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mellum2_megatron.architecture import Mellum2Architecture, find_architecture
from mellum2_megatron.common.errors import InputError, keyed, nearest, shown
from mellum2_megatron.common.values import dataclass_in, field_types, from_text
from mellum2_megatron.config.run import Run, keys

logger = logging.getLogger(__name__)

_LENGTH_IN_STEPS = re.compile(r"(step|iter|iters|iterations|epoch)s?$")
"""End of the names that other frameworks give to lengths."""
_OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "batch_size": "schedule.batch_schedule",
    "global_batch_size": "schedule.batch_schedule",
    "num_layers": "architecture.num_hidden_layers",
    "seq_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "beta1": "optimizer.adam_beta1",
    "beta2": "optimizer.adam_beta2",
    "gradient_clipping": "optimizer.clip_grad",
    "max_grad_norm": "optimizer.clip_grad",
}
"""Names of settings in other frameworks -> our key, where the spelling alone is not close."""
_OVERRIDE = "override "
"""Start of the source of an overridden key."""


def overridden(run: Run) -> list[str]:
    """Return the overrides of a run, as ``key=value``; a folder's with what was read in it."""
    return [
        source.removeprefix(_OVERRIDE)
        for source in run.sources.values()
        if source.startswith(_OVERRIDE)
    ]


def apply_overrides(run: Run, overrides: Sequence[str]) -> Run:
    """Return ``run`` with every ``key=value`` applied, then validated as a whole.

    Args:
        run: the run, left unchanged.
        overrides: full keys (``layout.ep``) with values as in `from_text`. Of a key given
            twice the last value holds, as with Hydra, and a warning names both.
            ``architecture=PRESET`` or ``architecture=FOLDER`` (`find_architecture`) exchanges the
            whole model; it is applied first, at any position in the list. Layer types follow
            ``architecture.num_hidden_layers`` and ``architecture.num_mtp_layers``, see
            `Mellum2Architecture.replace`.

    Returns:
        A new run. The source of an overridden key is the override itself.

    Raises:
        InputError: not ``key=value``, an unknown key (the nearest is named), a value of the wrong
            type (the expected one is named), or a combination that the run refuses.
    """
    pairs = [_split(override) for override in overrides]
    _warn_of_repeated(pairs)
    sources = dict(run.sources)
    # Whole models first: they replace the fields that the other overrides change.
    for key, text in pairs:
        if key == "architecture":
            architecture, origin = find_architecture(text)
            run = dataclasses.replace(run, architecture=architecture)
            # The old model's sources do not hold for the new one. The dot matches whole names,
            # the section's own source included.
            sources = {
                sourced: source
                for sourced, source in sources.items()
                if not f"{sourced}.".startswith("architecture.")
            }
            sources["architecture"] = f"{_OVERRIDE}architecture={origin}"
    # A tree of changes, applied at once: values that fit only together pass the checks.
    changes: dict[str, Any] = {}
    for key, text in pairs:
        if key != "architecture":
            *sections, name = key.split(".")
            section = changes
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = from_text(text, _annotation(key), key)
            sources[key] = f"{_OVERRIDE}{key}={text}"
    resolved: Run = _replace(run, {**changes, "sources": sources})
    return resolved


def _annotation(key: str) -> Any:
    """Return the annotation of a key's field."""
    *sections, name = key.split(".")
    fields = field_types(Run)
    for part in sections:
        fields = field_types(fields[part])
    return fields[name]


def _warn_of_repeated(pairs: Sequence[tuple[str, str]]) -> None:
    """Warn of keys with several values: one of them is most likely forgotten in a long command."""
    values: dict[str, str] = {}
    for key, text in pairs:
        if values.setdefault(key, text) != text:
            logger.warning(
                "%s is given more than once: %s holds, not %s",
                key,
                shown(f"{key}={text}", quote=False),
                shown(f"{key}={values[key]}", quote=False),
            )
            values[key] = text


def _split(override: str) -> tuple[str, str]:
    """Return key and value text of an override; refuse an unknown key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(
            shown(override, quote=False),
            rule="an override is KEY=VALUE",
            fix="write it like layout.ep=8, without blanks",
        )
    known = keys()
    if key == "architecture" or key in known:
        return key, text.strip()
    raise InputError(
        shown(override, quote=False),
        rule=f"there is no key {shown(key)}",
        fix=_right_key(key, known),
    )


def _right_key(key: str, known: Sequence[str]) -> str:
    """Return the fix for an unknown key, which names the key that was most likely meant."""
    # Most likely first: a section without its field, a length in steps, a field without its
    # section, a typo.
    section, name = key.partition(".")[0], key.rpartition(".")[2]
    inside = [candidate for candidate in known if candidate.startswith(f"{key}.")]
    same_name = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    whole = key.rpartition(".")[0]
    if whole in known and dataclass_in(_annotation(whole)):
        return f"give the whole of it at once, {whole}={{name: value, name: value}}"
    if inside:
        return f"set one of its fields: {', '.join(inside)}"
    if same_name:
        return f"did you mean {' or '.join(map(repr, same_name))}"
    if name in _OTHER_NAMES:
        return f"did you mean {_OTHER_NAMES[name]!r}"
    if _LENGTH_IN_STEPS.search(name):
        part = next((part for part in ("warmup", "decay", "horizon") if part in name), "train")
        return (
            f"set schedule.{part}_samples: lengths are in samples (packed sequences), "
            "steps times the sequences of a step (schedule.batch_schedule)"
        )
    fields = [
        candidate.removeprefix(f"{section}.")
        for candidate in known
        if candidate.startswith(f"{section}.")
    ]
    if fields:
        return nearest(key, known, show_all=False) + f" ({section} has {', '.join(fields)})"
    # A field without its section: compare the last word, and name where it is.
    by_name = {candidate.rpartition(".")[2]: candidate for candidate in reversed(known)}
    close = get_close_matches(name, by_name, n=1, cutoff=0.75)
    if close:
        return f"did you mean {by_name[close[0]]!r}"
    return nearest(key, known, show_all=False) + "; `mellum2 keys` explains all keys"


def _replace(instance: Any, changes: Mapping[str, Any]) -> Any:
    """Rebuild nested dataclasses from the inside out, each one once.

    Values that are changed together are therefore validated together.
    """
    fields = {
        name: _replace(getattr(instance, name), change)
        if isinstance(change, dict) and dataclasses.is_dataclass(getattr(instance, name))
        else change
        for name, change in changes.items()
    }
    # The architecture's own `replace` adapts the layer types to a new number of layers.
    if isinstance(instance, Mellum2Architecture):
        with keyed("architecture"):
            return instance.replace(**fields)
    return dataclasses.replace(instance, **fields)
