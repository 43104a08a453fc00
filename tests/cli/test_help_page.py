"""Help pages in narrow terminals: every option name in full."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pytest
import rich.table
from typer import rich_utils

from mellum2_megatron.cli import help_page
from mellum2_megatron.cli.app import command_line
from tests.cli.runner import mellum2


def _commands(command: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command with the words that call it."""
    yield words, command
    for word, below in getattr(command, "commands", {}).items():
        yield from _commands(below, *words, word)


def _cut_names() -> tuple[int, list[str]]:
    """Return the number of names in the help pages of all commands, and those that are not whole.

    A name is that of an option, and its values where they are an alternative.
    """
    names, cut = 0, []
    root = command_line()  # once: it takes longer than all pages
    for words, command in _commands(root):
        page = io.StringIO()
        with contextlib.redirect_stdout(page):
            root.main([*words, "--help"], prog_name="mellum2", standalone_mode=False)
        printed = set(page.getvalue().replace(",", " ").split())
        wanted = [name for option in command.params for name in option.opts + option.secondary_opts]
        wanted = [name for name in wanted if name.startswith("-")]
        names += len(wanted)
        cut += [f"{' '.join(words)} {name}" for name in wanted if name not in printed]
        cut += [f"{' '.join(words)} {word}" for word in printed if word[0] == "-" and "…" in word]
    return names, cut


def test_option_names_are_whole_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names, cut = _cut_names()
    assert names > 200
    assert not cut


def test_typer_itself_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it does not, `OptionTable` can go."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(help_page, "OptionTable", rich.table.Table)
    _, cut = _cut_names()
    assert any("…" in word for word in cut)
    assert rich_utils.Table is rich.table.Table


def test_texts_stand_beside_short_names_and_below_long_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    below = mellum2("data", "prepare", "-h").out.splitlines()
    (place,) = (number for number, line in enumerate(below) if "--max-document-megabytes" in line)
    assert "leave out longer documents" not in below[place]
    assert "leave out longer documents" in below[place + 1]
    assert "* --output <path>" in mellum2("data", "prepare", "-h").out  # a required option
    (line,) = (line for line in mellum2("train", "-h").out.splitlines() if "--verbose" in line)
    assert "show Megatron's own output" in line
