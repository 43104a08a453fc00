"""Reference of every key of a run: type, default, and meaning from the docstrings.

The ``Attributes`` of the run's dataclasses are the only place where a key is described.
``docs/keys.md`` and `mellum2 keys` are made from them.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Any

from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.values import describe, field_types, to_plain
from mellum2_megatron.config.run import Run, keys


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyEntry:
    """The description of one key.

    Attributes:
        key: full key, such as ``layout.ep``.
        type: accepted values in words.
        default: default as an override is written; None: the key has none, each recipe sets it.
        meaning: text of the docstring, in one line.
    """

    key: str
    type: str
    default: str | None
    meaning: str

    @property
    def section(self) -> str:
        """Part of the key before its first dot; empty for a key of the run itself."""
        return self.key.rpartition(".")[0].partition(".")[0]


def key_entries() -> list[KeyEntry]:
    """Return the description of every key, in the order of a run file."""
    return [_entry(key) for key in keys()]


def find_entries(word: str) -> list[KeyEntry]:
    """Return the entries of a key, or of all keys in a section.

    Raises:
        InputError: there is no such key and no such section.
    """
    found = [
        entry for entry in key_entries() if entry.key == word or entry.key.startswith(f"{word}.")
    ]
    if not found:
        sections = {entry.section for entry in key_entries()} - {""}
        raise InputError(
            word, rule="no such key or section", fix=nearest(word, {*keys(), *sections})
        )
    return found


def keys_page() -> str:
    """Return the content of ``docs/keys.md``."""
    lines = [
        "# All keys of a run",
        "",
        "`python -m tests.config.keys_page` makes this page from the docstrings of the run's",
        "classes: change those. `mellum2 keys [SECTION|KEY]` prints the same. A recipe has its",
        "own values: `mellum2 train RECIPE --dry-run` shows them with their sources.",
    ]
    section = None
    # Keys of the run itself are both before and after its sections in a run file.
    for entry in sorted(key_entries(), key=lambda entry: entry.section != ""):
        if entry.section != section:
            section = entry.section
            lines += ["", f"## {section or 'The run itself'}", ""]
            lines += ["| Key | Value | Default | Meaning |", "|---|---|---|---|"]
        default = "" if entry.default is None else f"`{entry.default}`"
        cells = (f"`{entry.key}`", entry.type, default, entry.meaning.replace("``", "`"))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def attribute_texts(cls: type) -> dict[str, str]:
    """Return the text of each name under ``Attributes`` in a class's docstring, in one line.

    Two names before one colon share their text.
    """
    doc = inspect.cleandoc(cls.__doc__ or "")
    block = re.search(r"^Attributes:\n((?: +.*\n|\n)+)", doc + "\n", re.MULTILINE)
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in block[1].splitlines() if block else []:
        start = re.fullmatch(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            texts |= dict.fromkeys(names, start[2])
        else:
            texts |= {name: f"{texts[name]} {line.strip()}".strip() for name in names}
    return texts


def key_annotation(key: str) -> Any:
    """Return the annotation of a key's field."""
    cls, name = _field(key)
    return field_types(cls)[name]


def _field(key: str) -> tuple[Any, str]:
    """Return the dataclass of a key, and the name of its field there."""
    cls: Any = Run
    *sections, name = key.split(".")
    for part in sections:
        cls = field_types(cls)[part]
    return cls, name


def _entry(key: str) -> KeyEntry:
    cls, name = _field(key)
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    default = None
    if field.default is not dataclasses.MISSING:
        default = _written(to_plain(field.default))
    elif field.default_factory is not dataclasses.MISSING:
        default = _written(to_plain(field.default_factory()))
    return KeyEntry(
        key=key,
        type=describe(key_annotation(key)),
        default=default,
        meaning=attribute_texts(cls)[name],
    )


def _written(value: Any) -> str:
    """Return a value as an override is written: ``null``, ``true``, ``[a,b]``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return str(value) if value != "" else "''"
