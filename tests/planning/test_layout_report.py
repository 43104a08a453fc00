"""The layout report compared with Megatron: groups, weights on a rank, bytes on the wire."""

from __future__ import annotations

import dataclasses
import functools
import io
from typing import Any

import pytest

from mellum2_megatron.config import Layout, Run, apply_overrides
from mellum2_megatron.planning.gradient_buffers import adam_weights, buffer_elements, ownership
from mellum2_megatron.planning.layout_report import bytes_sent, layout_report, process_groups
from mellum2_megatron.recipes import recipe, recipe_names
from tests import parameter_id
from tests.distributed import run_distributed
from tests.layouts.worker import ARCHITECTURE, BATCH, SEQUENCE, Case, Outcome
from tests.model.test_muon import run_of as muon_run

TINY = "mellum2_tiny_pretrain"

MEASURED: dict[str, tuple[int, Case]] = {
    "tp2": (2, Case(tp=2)),
    "ep2": (2, Case(ep=2)),
    "ep2_allgather": (2, Case(ep=2, dispatcher="allgather")),
    "etp2": (2, Case(etp=2)),
    "pp4": (4, Case(pp=4)),
    "pp2_vpp2": (2, Case(pp=2, vpp=2)),
    "cp4": (4, Case(cp=4)),
    "tp2_ep2_dp2": (4, Case(tp=2, ep=2)),
}


def run_of(case: Case) -> Run:
    """Return a run with the model and batch of the layout tests and `case`'s layout.

    Adam, whose buffers have no padding.
    """
    run = recipe(TINY)
    ways = {
        name: getattr(case, name) for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "dispatcher")
    }
    return dataclasses.replace(
        run,
        architecture=ARCHITECTURE,
        optimizer=dataclasses.replace(run.optimizer, name="adam"),
        layout=Layout(sp=case.tp > 1, **ways),
        data=dataclasses.replace(run.data, sequence_length=SEQUENCE),
        schedule=dataclasses.replace(
            run.schedule, micro_batch_size=1, batch_schedule=((0, BATCH),)
        ),
    )


@functools.cache
def outcomes(name: str) -> list[Outcome]:
    ranks, case = MEASURED[name]
    return run_distributed("tests.layouts.worker:step", ranks, case)


@pytest.mark.distributed
@pytest.mark.parametrize("name", MEASURED)
def test_parameters_are_those_of_the_modules(name: str):
    ranks, case = MEASURED[name]
    stages = layout_report(run_of(case), world_size=ranks)["stages"]
    for outcome in outcomes(name):
        held = sum(gradient.numel() for gradient in outcome.gradients.values())
        assert stages[outcome.ranks["pp"]]["parameters"] == held


@pytest.mark.distributed
@pytest.mark.parametrize("name", MEASURED)
def test_bytes_are_those_on_the_wire(name: str):
    """In float32, as the layout tests run. Exact but for experts, whose load is uneven."""
    ranks, case = MEASURED[name]
    run = run_of(case)
    micro_batches = BATCH // run.layout.data_parallel(ranks)
    measured: dict[str, list[float]] = {}
    expected: dict[str, list[float]] = {}
    for outcome in outcomes(name):
        reported = bytes_sent(
            run, world_size=ranks, stage=outcome.ranks["pp"], micro_batches=micro_batches, element=4
        )
        for axis, size in reported.items():
            measured.setdefault(axis, []).append(outcome.sent.get(axis, 0.0))
            expected.setdefault(axis, []).append(size)
    assert sum(map(sum, expected.values())) > 0
    for axis in expected:
        if axis == "ep":
            assert sum(measured[axis]) == pytest.approx(sum(expected[axis]), rel=0.1), axis
        else:
            assert measured[axis] == pytest.approx(expected[axis], rel=1e-6), axis


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [
        (2, ()),
        (
            4,
            (
                "layout.ep=2",
                "optimizer.overlap_grad_reduce=true",
                "optimizer.overlap_param_gather=true",
            ),
        ),
    ],
    ids=parameter_id,
)
def test_muon_sends_the_padding_of_its_buffers_too(nproc: int, overrides: tuple[str, ...]):
    # The backend decides the order of weights, and with it the owners.
    run = muon_run("backend=torch", *overrides)
    expected = bytes_sent(run, world_size=nproc, stage=0, micro_batches=1)["dp"]
    owned = ownership(run, nproc, "torch")
    ((dense, adams), *_) = adam_weights(run, nproc, "torch")
    small = buffer_elements(run, nproc, "torch") - sum(each.buffer for each in owned)
    # Padding that aligns Adam's weights: left out of the report.
    small -= sum(weight.numel for weight in adams)
    for sent in run_distributed("tests.model.optimizer_worker:bytes_of_a_step", nproc, run):
        assert sent == expected + 6 * small * (dense - 1) / dense
    assert sum(each.buffer - sum(each.elements) for each in owned) > 0


@pytest.mark.distributed
@pytest.mark.parametrize("overrides", [(), ("layout.ep=2",)], ids=parameter_id)
def test_even_shares_are_sent_to_owners_and_back(overrides: tuple[str, ...]):
    """The mean over four ranks; each owner sends and receives its own matrices."""
    run = muon_run("backend=torch", "optimizer.muon_dense_shards=even", *overrides)
    expected = bytes_sent(run, world_size=4, stage=0, micro_batches=1)["dp"]
    owned = ownership(run, 4, "torch")
    ((_, adams), *_) = adam_weights(run, 4, "torch")
    small = buffer_elements(run, 4, "torch") - sum(each.buffer for each in owned)
    small -= sum(weight.numel for weight in adams)
    ranks = run_distributed("tests.model.optimizer_worker:bytes_of_a_step", 4, run)
    assert sum(ranks) == pytest.approx(4 * expected + 4 * 6 * small * 3 / 4, abs=2)
    assert len(set(ranks)) > 1
    whole = muon_run("backend=torch", *overrides)
    more = expected - bytes_sent(whole, world_size=4, stage=0, micro_batches=1)["dp"]
    dense, before = owned[0], ownership(whole, 4, "torch")[0]
    assert dense.owned == before.owned
    # A quarter of the matrices lies in its owner's share by chance.
    assert 0.5 < dense.exchanged / sum(dense.elements) < 1
    saved = 6 * (before.buffer - dense.buffer) * 3 / 4
    assert more == pytest.approx(6 * dense.exchanged / 4 - saved, abs=2)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "ways"),
    [
        (8, {"tp": 2, "cp": 2, "pp": 2}),
        (8, {"tp": 2, "ep": 4, "etp": 1}),
        (8, {"ep": 2, "etp": 2, "pp": 2}),
    ],
    ids=parameter_id,
)
def test_groups_are_megatrons(ranks: int, ways: dict[str, int]):
    groups = process_groups(Layout(sp="tp" in ways, **ways), ranks)
    for rank, found in enumerate(run_distributed("tests.layouts.worker:groups", ranks, ways)):
        for name, members in found.items():
            assert members in groups[name], (rank, name)
            assert rank in members


PLAIN = [
    name for name in recipe_names() if not any(part in name for part in ("fast", "bf16", "h100"))
]
"""Recipes whose layouts differ: not the variants of the same machines."""


@pytest.mark.parametrize("name", PLAIN)
def test_stages_add_up(name: str):
    run = recipe(name)
    for overrides in ([], ["layout.dp=null", "layout.pp=2", "layout.ep=1"]):
        changed = apply_overrides(run, overrides)
        ranks = changed.layout.world_size or changed.layout.smallest_world_size
        report = layout_report(changed, world_size=ranks)
        layers = [layer for stage in report["stages"] for part in stage["layers"] for layer in part]
        assert sorted(layers) == list(range(run.architecture.num_hidden_layers))
        assert sum(stage["flops_share"] for stage in report["stages"]) == pytest.approx(1)
        assert report["stages"][-1]["also"][-2:] == ["output head", "MTP"]


def test_flops_of_one_stage_are_the_models():
    from mellum2_megatron.planning.layout_report import _stage_flops

    run = recipe("mellum2_12b_pretrain_phase1")
    whole = sum(run.architecture.flops_by_component(8192).values())
    assert _stage_flops(run.architecture, Layout(), 0, 8192) == whole
    halves = [_stage_flops(run.architecture, Layout(pp=2), stage, 8192) for stage in range(2)]
    assert sum(halves) == whole
    assert halves[1] > halves[0]  # the head, twice, and the MTP layer


def test_virtual_stages_are_dealt_out_in_turn():
    from mellum2_megatron.planning.layout_report import stage_layers

    layout = Layout(pp=2, vpp=2)
    assert [stage_layers(ARCHITECTURE, layout, stage) for stage in range(2)] == [
        [[0], [2]],
        [[1], [3]],
    ]


def test_the_table_names_what_matters():
    from rich.console import Console

    from mellum2_megatron.planning.layout_report import render_layout

    run = apply_overrides(
        recipe("mellum2_12b_pretrain_phase1"), ["layout.dp=null", "layout.pp=4", "layout.cp=2"]
    )
    console = Console(width=80, record=True, file=io.StringIO())
    for table in render_layout(layout_report(run, world_size=64)):
        console.print(table)
    shown: Any = console.export_text()
    for word in (
        "21-27 embedding",
        "output head MTP",
        "3 all_gather, 1 p2p",
        "dp with cp",
        "0, 16, 32, 48",
        "ep 2,016.00",
    ):
        assert word in shown, shown
    assert max(map(len, shown.splitlines())) <= 80
