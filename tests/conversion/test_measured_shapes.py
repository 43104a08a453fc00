"""Shapes timed on this CPU: the correlation is that of the rows, and large shapes are refused."""

from __future__ import annotations

import json

import pytest
import scipy.stats

from conversion.huggingface.measured_shapes import measure_shapes, this_cpu
from mellum2_megatron.architecture import PRESETS
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.planning.latency import CostModel, Workload
from tests.cli.runner import mellum2

TINY = PRESETS["mellum2-tiny"].replace(num_mtp_layers=0)


def test_command_states_the_correlation_of_its_rows() -> None:
    result = mellum2(
        *("search", "mellum2-tiny", "--layers", "1,2", "--hidden", "64,128", "--measure"),
        *("--prompt", "8", "--output", "3", "--json"),
    )
    assert result.code == 0, result
    measured = json.loads(result.out)["measured"]
    rows = measured["rows"]
    assert [(row["layers"], row["hidden"]) for row in rows] == [
        (1, 64),
        (1, 128),
        (2, 64),
        (2, 128),
    ]
    assert all(row["measured"] > 0 and row["analytic"] > 0 for row in rows)
    columns = ([row[key] for row in rows] for key in ("measured", "analytic"))
    expected = scipy.stats.spearmanr(*columns).statistic
    assert measured["rank_correlation"] == pytest.approx(expected, nan_ok=True)


def test_this_cpu_is_a_machine() -> None:
    machine = this_cpu()
    # No time is asserted: any CPU lies far inside these bounds.
    assert 1e7 < machine.bandwidth < 1e13
    assert 1e7 < machine.flops < 1e15
    assert 0 < machine.launch < 1
    assert CostModel(TINY).latency(machine, Workload(prompt=8, output=4)).sync > 0


def test_too_few_and_too_large_shapes_are_refused() -> None:
    workload = Workload(prompt=8, output=4)
    with pytest.raises(InputError, match="--measure with 2 shapes"):
        measure_shapes([TINY, TINY], workload)
    with pytest.raises(InputError, match="2304"):
        measure_shapes([PRESETS["mellum2-12b"]] * 3, workload)
