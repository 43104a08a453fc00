"""Console output: unbroken lines, and tables without frames."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mellum2_megatron.common.console import plain_table, print_line


def test_a_line_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"/data/{'long/' * 60}[b, s] 12_000 :smile:"
    print_line(text)
    assert capsys.readouterr().out == text + "\n"


def test_a_table_has_no_frame() -> None:
    table = plain_table("name", "size", title="Weights")
    table.add_row("lm_head", "12")
    shown = Console(width=40, record=True, file=io.StringIO())
    shown.print(table)
    lines = [line.rstrip() for line in shown.export_text().splitlines()]
    assert lines == ["Weights", "name     size", "lm_head  12"]
