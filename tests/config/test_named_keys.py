"""Every key that a message or a page names exists: a fix that cannot be typed is none."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from mellum2_megatron.common.values import field_types
from mellum2_megatron.config import Run, keys
from tests import REPOSITORY

SOURCES = ("mellum2_megatron", "launchers", "conversion", "ablations")
SECTIONS = [name for name, kind in field_types(Run).items() if dataclasses.is_dataclass(kind)]
# `layout.ep=`, not `run.layout.ep=` or `$data.x=`.
NAMED = re.compile(rf"(?<![\w./$-])((?:{'|'.join(SECTIONS)})(?:\.[a-z_][a-z0-9_]*)+)=(?!=)")


def source_texts() -> Iterator[tuple[Path, str]]:
    for folder in SOURCES:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield path, node.value


def page_texts() -> Iterator[tuple[Path, str]]:
    for path in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]:
        yield path, path.read_text(encoding="utf-8")


def unknown(texts: Iterator[tuple[Path, str]]) -> tuple[int, list[str]]:
    known, found, wrong = set(keys()), 0, []
    for path, text in texts:
        for key in NAMED.findall(text):
            found += 1
            if key not in known:
                wrong.append(f"{path.relative_to(REPOSITORY)}: {key}")
    return found, wrong


def test_keys_in_messages_exist() -> None:
    found, wrong = unknown(source_texts())
    assert wrong == []
    assert found > 100, "the pattern finds the keys"


def test_keys_on_pages_exist() -> None:
    found, wrong = unknown(page_texts())
    assert wrong == []
    assert found > 10
