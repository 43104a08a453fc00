"""`mellum2 search`: the map, its frontier, and its picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mellum2_megatron.architecture import PRESETS
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.planning.gpus import GPUS
from mellum2_megatron.planning.latency import CostModel, Workload
from mellum2_megatron.planning.latency_map import draw_map
from mellum2_megatron.planning.shape_search import VARIED, render, search_shapes
from tests.cli.runner import mellum2

TINY = PRESETS["mellum2-tiny"]
REQUEST = Workload(prompt=200, output=20)


def _search(**options: object) -> dict[str, object]:
    settings: dict[str, object] = {"layers": (2, 4, 6), "hidden": (128, 256, 384)}
    return search_shapes(TINY, GPUS["h100"], REQUEST, **{**settings, **options})  # type: ignore[arg-type]


def test_the_map_holds_the_shape_itself_and_its_equals() -> None:
    report = _search()
    assert json.loads(json.dumps(report)) == report
    base = next(r for r in report["grid"] if (r["layers"], r["hidden"]) == (4, 256))
    assert base == report["base"]
    assert base["parameters"] == TINY.num_parameters(mtp=False)
    assert base["sync"] == CostModel(TINY).latency(GPUS["h100"], REQUEST).sync
    for mode in ("sync", "throughput"):
        for found in report["frontier"]["base"][mode]:
            depth = [r for r in report["grid"] if r["layers"] == found["layers"]]
            best = [r["hidden"] for r in depth if r[mode] <= base[mode]]
            assert found["hidden"] == max(best)
        assert [r["layers"] for r in report["frontier"]["base"][mode]][:2] == [2, 4]


def test_one_size_is_changed_at_a_time() -> None:
    report = _search()
    names = {(row["field"], row["value"]) for row in report["varied"]}
    assert names == {(f, v) for f in VARIED for v in (getattr(TINY, f) // 2, getattr(TINY, f) * 2)}
    more = next(r for r in report["varied"] if (r["field"], r["value"]) == ("num_experts", 16))
    assert more["parameters"] == TINY.replace(num_experts=16).num_parameters(mtp=False)
    assert more["active"] > report["base"]["active"]  # the router's rows alone
    # All heads are key heads already: twice as many is no shape, and the table says why.
    full = search_shapes(
        TINY.replace(num_key_value_heads=4), GPUS["h100"], REQUEST, layers=(4,), hidden=(256,)
    )
    refused = [row for row in full["varied"] if "refused" in row]
    assert [(row["field"], row["value"]) for row in refused] == [("num_key_value_heads", 8)]
    with pytest.raises(InputError, match="num_key_value_heads"):
        _search(varied={"num_key_value_heads": (3,)})
    with pytest.raises(InputError, match="no field to vary"):
        _search(varied={"hidden_size": (3,)})


def test_shapes_that_do_not_fit_are_said_to() -> None:
    report = search_shapes(
        PRESETS["mellum2-12b"], GPUS["l40s"], Workload(), layers=(28, 48), hidden=(2304, 4096)
    )
    largest = report["grid"][-1]
    assert (largest["fits"], largest["throughput"]) == (False, None)
    assert largest not in report["frontier"]["dense"]["sync"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(report, base="mellum2-12b"))
    text = console.export_text()
    assert "12.15B" in text
    assert "2.44B" in text
    assert "…" not in text


def test_the_picture_needs_an_area(tmp_path: Path) -> None:
    draw_map(_search(), tmp_path / "map.png", base="tiny")
    draw_map(_search(), tmp_path / "again.png", base="tiny")
    first = (tmp_path / "map.png").read_bytes()
    assert first[:4] == b"\x89PNG"
    assert first == (tmp_path / "again.png").read_bytes()
    with pytest.raises(InputError, match="two values or more"):
        draw_map(_search(layers=(4,)), tmp_path / "no.png", base="tiny")


def test_command(tmp_path: Path) -> None:
    words = ("search", "mellum2-tiny", "--prompt", "200", "--output", "20", "--hidden", "128,256")
    result = mellum2(*words, "--layers", "2:4:2", "--json", "--vary", "num_experts=4,16")
    assert result.code == 0, result
    report = json.loads(result.out)
    assert [(r["layers"], r["hidden"]) for r in report["grid"]] == [
        (2, 128),
        (2, 256),
        (4, 128),
        (4, 256),
    ]
    assert [row["value"] for row in report["varied"]] == [4, 16]
    drawn = mellum2(*words, "--layers", "2,4", "--out", tmp_path / "a.png")
    assert drawn.code == 0
    assert "Widest shape" in drawn.out
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--layers", "4:2:1"), "--layers 4:2:1"),
        (("--layers", "1:999999:1"), "1 to 64"),
        (("--layers", "1:2"), "FIRST:LAST:STEP"),
        (("--hidden", "-128"), "--hidden -128"),
        (("--vary", "num_expert=2"), "num_experts"),
        (("--vary", "num_experts"), "--vary num_experts"),
        (("--gpu", "h1000"), "h100"),
        (("--out", "map.pdf"), "PNG"),
        (("--prompt", "600"), "max_position_embeddings=512"),
    ],
)
def test_bad_words(words: tuple[str, ...], named: str) -> None:
    mellum2("search", "mellum2-tiny", "--prompt", "100", "--output", "8", *words).refused(named)
