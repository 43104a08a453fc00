"""Keys that NeMo-RL's configuration declares, in the version that this project renders for.

Its classes accept any other key in silence (``extra="allow"``, TypedDict), so that a misspelt one
does nothing. ``declared_keys.json`` beside this file has the declared ones; ``python -m
tests.rlvr.nemo_rl_keys CHECKOUT`` writes it anew.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, nearest

FILE = Path(__file__).with_name("declared_keys.json")

_OF_THE_LOADER = frozenset({"defaults", "_override_"})
"""Keys that nemo_rl/utils/config.py takes out before the classes see them."""


@functools.cache
def declared() -> tuple[str, frozenset[str]]:
    """Return the commit of NeMo-RL, and its keys; one that ends in ``.*`` holds any others."""
    facts = json.loads(FILE.read_text("utf-8"))
    return str(facts["commit"]), frozenset(facts["keys"])


def require_declared(config: Mapping[str, Any]) -> None:
    """Refuse a configuration with a key that NeMo-RL does not declare.

    Raises:
        InputError: the first such key, with the nearest.
    """
    commit, known = declared()
    for key in _keys(config, ""):
        section, _, name = key.rpartition(".")
        if name in _OF_THE_LOADER or key in known or _in_open_section(section, known):
            continue
        raise InputError(
            key,
            rule=f"NeMo-RL {commit[:9]} declares no such key, and would ignore it",
            fix=nearest(key, known, show_all=False),
        )


def _in_open_section(section: str, known: frozenset[str]) -> bool:
    """Return true if a section, or one around it, takes any keys."""
    while section:
        if f"{section}.*" in known:
            return True
        section = section.rpartition(".")[0]
    return False


def _keys(config: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield the full key of every value, those of sections included."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value, f"{key}.")
