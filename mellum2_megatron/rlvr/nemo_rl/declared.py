"""Keys that NeMo-RL's configuration declares: of a checkout, or of the version written down here.

Its classes accept any other key in silence (``extra="allow"``, TypedDict), so that a misspelt one
does nothing. They are read in the checkout that the run is rendered for. Where that is not on this
machine, ``declared_keys.json`` beside this file has those of one version.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.rlvr.nemo_rl.source_keys import ROOT, SourceReader

FILE = Path(__file__).with_name("declared_keys.json")

_OF_THE_LOADER = frozenset({"defaults", "_override_"})
"""Keys that nemo_rl/utils/config.py takes out before the classes see them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """Keys of one version of NeMo-RL.

    Attributes:
        commit: the version; ``unknown`` for a checkout without git.
        keys: full keys; one that ends in ``.*`` holds any others.
        read: true if they were read in a checkout, false if they come from ``FILE``.
    """

    commit: str
    keys: frozenset[str]
    read: bool


@functools.cache
def declared(checkout: Path | None = None) -> Declared:
    """Return the keys of a checkout, or those of ``FILE`` if it is not on this machine.

    Args:
        checkout: NeMo-RL's checkout; None (default): those of ``FILE``.

    Raises:
        InputError: see `SourceReader.keys`.
    """
    module = Path(*ROOT[0].split(".")).with_suffix(".py")
    if checkout is None or not (checkout / module).is_file():
        facts = json.loads(FILE.read_text("utf-8"))
        return Declared(commit=str(facts["commit"]), keys=frozenset(facts["keys"]), read=False)
    return Declared(commit=commit_of(checkout), keys=SourceReader(checkout).keys(), read=True)


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout, ``unknown`` without git."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.strip() or "unknown"


def require_declared(config: Mapping[str, Any], version: Declared) -> None:
    """Refuse a configuration with a key that NeMo-RL does not declare.

    Raises:
        InputError: the first such key, with the nearest.
    """
    known = version.keys
    for key, _ in _entries(config, ""):
        section, _, name = key.rpartition(".")
        if name in _OF_THE_LOADER or key in known or _in_open_section(section, known):
            continue
        raise InputError(
            key,
            rule=f"NeMo-RL {version.commit[:9]} declares no such key, and would ignore it",
            fix=nearest(key, known, show_all=False),
        )


def require_literal(config: Mapping[str, Any]) -> None:
    """Refuse texts that NeMo-RL's loader would put something else in place of.

    Raises:
        InputError: the first text with ``${``, which OmegaConf resolves.
    """
    for key, value in _entries(config, ""):
        if isinstance(value, str) and "${" in value:
            raise InputError(
                f"{key}: {value}",
                rule="NeMo-RL's loader (OmegaConf) would resolve ${...} in it",
                fix="use a name without ${",
            )


def _in_open_section(section: str, known: frozenset[str]) -> bool:
    """Return true if a section, or one around it, takes any keys."""
    while section:
        if f"{section}.*" in known:
            return True
        section = section.rpartition(".")[0]
    return False


def _entries(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield full key and value of every entry, sections included."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        yield key, value
        if isinstance(value, Mapping):
            yield from _entries(value, f"{key}.")
