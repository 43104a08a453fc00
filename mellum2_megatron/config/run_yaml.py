"""A run as YAML.

`to_yaml` and `from_yaml` are exact inverses, so the ``run.yaml`` beside a run's checkpoints is
complete.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import yaml

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import keyed
from mellum2_megatron.common.text import read_yaml
from mellum2_megatron.common.values import NULLS, from_mapping, to_plain
from mellum2_megatron.config.run import Run

logger = logging.getLogger(__name__)


def to_yaml(run: Run) -> str:
    """Return ``run`` as YAML: every value, defaults included, and the sources."""
    text: str = yaml.dump(
        to_plain(run), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118
    )
    return text


class _Dumper(yaml.SafeDumper):
    """YAML writer that gives each key a line and writes lists in brackets."""

    def represent_sequence(
        self, tag: str, sequence: Iterable[Any], flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)

    def represent_mapping(
        self, tag: str, mapping: Any, flow_style: bool | None = None
    ) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style=False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Without quotes `none` would be read as an absent value; PyYAML leaves quotes out where YAML
    # alone reads text.
    quotes = "'" if text.lower() in NULLS else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quotes)


_Dumper.add_representer(str, _represent_text)


def from_yaml(text: str, *, warn: bool = True) -> Run:
    """Read what `to_yaml` writes; the result equals the run that was written.

    Args:
        text: the YAML.
        warn: log each key that is younger than the file, default true.

    Raises:
        InputError: not YAML, an unknown or missing key, or a value of another type, each naming the
            full key.
    """

    # `to_yaml` writes every key, so that a new default cannot change an old run. A missing key is
    # therefore younger than the file.
    def warn_of_default(key: str) -> None:
        logger.warning("the run file is from before %s existed; taking its default", key)

    on_default = warn_of_default if warn else None

    def architecture(value: Any, key: str) -> Mellum2Architecture:
        with keyed(key):
            return from_mapping(
                Mellum2Architecture, value, document=document, key=key, on_default=on_default
            )

    document = "run file"
    values = read_yaml(text, document=document, fix="give a file that `mellum2 train` wrote")
    return from_mapping(
        Run,
        values,
        document=document,
        on_default=on_default,
        readers={"architecture": architecture},
    )
