"""Bars of work in stages: each reaches its end."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from mellum2_megatron.common import stage_bars


def test_each_bar_reaches_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=120)
    monkeypatch.setattr(stage_bars, "error_console", terminal)
    log = logging.getLogger("test")
    with stage_bars.stage_bars(True, log, unit="bytes") as start_stage:
        start_stage("reading", 1000)(300)  # a limit that the text does not reach
        encoded = start_stage("encoding", 500)
        for _ in range(4):
            encoded(100)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines()
    last = {word: line for line in shown for word in ("reading", "encoding") if word in line}
    assert "300/300 bytes" in last["reading"]
    assert "400/400 bytes" in last["encoding"]


def test_tasks_are_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=120)
    monkeypatch.setattr(stage_bars, "error_console", terminal)
    caplog.set_level(logging.INFO)
    with stage_bars.stage_bars(True, logging.getLogger("test"), unit="tasks") as start_stage:
        advance = start_stage("packs", 3)
        for _ in range(3):
            advance(1)
    assert "3/3" in stream.getvalue()
    assert caplog.messages == ["packs (3)"]
