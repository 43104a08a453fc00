"""`mellum2 info`: figures add up to the architecture's, and tables print every number in full."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from mellum2_megatron.architecture import PRESETS
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.planning.architecture_report import architecture_report, render
from mellum2_megatron.planning.memory import Memory

MEMORY = Memory(
    parameters=10,
    weights=3 * 2**30,
    gradients=2**30,
    padding=2**27,
    optimizer=2**29,
    activations=2**28,
    transients=2**26,
    imbalance=2**25,
    buffers=2**24,
)


def _text(report: dict[str, object], width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(report, title="model"))
    return console.export_text()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mtp_layers", [0, 1])
def test_components_add_up(preset: str, mtp_layers: int) -> None:
    arch = PRESETS[preset].replace(num_mtp_layers=mtp_layers)
    report = architecture_report(arch, sequence_length=512)
    rows = report["components"]
    assert (
        sum(row["parameters"] for row in rows)
        == report["parameters"]["total_with_mtp"]
        == arch.num_parameters()
    )
    assert sum(row["active"] for row in rows) == report["parameters"]["active_with_mtp"]
    assert sum(row["flops_per_token"] for row in rows) == pytest.approx(
        arch.flops_per_token(512), rel=1e-12
    )
    assert ("MTP head" in [row["component"] for row in rows]) == bool(mtp_layers)
    assert json.loads(json.dumps(report)) == report


def test_released_figures_are_printed_exactly() -> None:
    text = _text(architecture_report(PRESETS["mellum2-12b"]))
    for figure in (
        "12,149,923,072",
        "12,578,294,528",
        "2,439,060,736",
        "2,520,615,680",
        "17.570 GFLOP",
        "15.675 GFLOP",
        "24.30 GB",
        "226,492,416",
    ):
        assert figure in text, figure
    assert "Memory per rank" not in text
    assert "Not a multiple" not in text


def test_layer_rows_carry_window_and_rope() -> None:
    report = architecture_report(PRESETS["mellum2-12b-128k"])
    sliding, full = report["layers"]
    assert (
        len(sliding["layers"]),
        sliding["window"],
        sliding["rope_type"],
        sliding["mtp_layers"],
    ) == (
        21,
        1024,
        "default",
        1,
    )
    assert (full["layers"], full["window"], full["rope_type"]) == (
        [3, 7, 11, 15, 19, 23, 27],
        None,
        "yarn",
    )
    assert full["keys_per_query"] == (131072 + 1) / 2
    text = _text(report)
    assert "YaRN x16" in text
    assert "1.2773" in text


def test_memory_and_misalignment_are_shown_when_there_are_any() -> None:
    report = architecture_report(PRESETS["mellum2-tiny"].replace(hidden_size=200), memory=MEMORY)
    assert report["memory_per_rank"]["total"] == (
        4 * 2**30 + 2**29 + 2**28 + 2**27 + 2**26 + 2**25 + 2**24
    )
    text = _text(report)
    assert "hidden_size = 200" in text
    assert "4.98" in text
    assert re.search(r"^padding +0\.12 *$", text, re.MULTILINE)


def test_a_sequence_has_at_least_one_token() -> None:
    with pytest.raises(InputError, match="sequence_length=0"):
        architecture_report(PRESETS["mellum2-tiny"], sequence_length=0)
