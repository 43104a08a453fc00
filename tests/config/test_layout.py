"""Layouts: what fits a model, the values an error proposes, the derived communication."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Layout

BIG = Mellum2Architecture.preset("mellum2-12b")
TINY = Mellum2Architecture.preset("mellum2-tiny")


@pytest.mark.parametrize(
    ("layout", "world_size", "sequence", "named", "fix"),
    [
        (Layout(tp=8, sp=True), 8, 8192, "layout.tp=8", "layout.tp=4"),
        (Layout(tp=3, sp=True), 3, 8192, "layout.tp=3", "layout.tp=2 or 4"),
        (Layout(ep=6), 6, 8192, "layout.ep=6", "layout.ep=4 or 8"),
        (Layout(etp=3), 3, 8192, "layout.etp=3", "layout.etp=2 or 4"),
        (Layout(pp=8), 8, 8192, "layout.pp=8", "layout.pp=7 or 14"),
        (Layout(pp=4, vpp=2), 4, 8192, "layout.vpp=2", "layout.vpp=1 or 7"),
        (Layout(cp=8), 8, 8200, "layout.cp=8 with data.sequence_length=8200", "layout.cp=5 or 10"),
        (Layout(tp=2, sp=True, cp=2), 4, 8196 - 6, "layout.cp=2", "layout.cp=1 or 3"),
        (Layout(tp=4, sp=True), 4, 8190, "layout.tp=4", "layout.tp=3 or 5"),
        (Layout(tp=2, sp=True, cp=2), 6, 8192, "on 6 ranks", "4 or 8 ranks"),
        (Layout(ep=8), 12, 8192, "layout.ep=8", "layout.ep=4, or start 8 or 16 ranks"),
        (Layout(ep=8), 4, 8192, "layout.ep=8", "layout.ep=4, or start 8 ranks"),
        (Layout(dp=2), 4, 8192, "layout.dp=2", "layout.dp=4"),
        (Layout(ep=8, dp=256), 3, 8192, "layout.dp=256", "start 256 ranks, or set layout.dp=null"),
        (Layout(ep=8, dp=5), 12, 8192, "layout.ep=8", "set layout.dp=null and start 8 or 16 ranks"),
    ],
)
def test_a_misfit_is_named_with_what_works(
    layout: Layout, world_size: int, sequence: int, named: str, fix: str
) -> None:
    with pytest.raises(InputError) as error:
        layout.validate(BIG, world_size=world_size, sequence_length=sequence)
    assert named in error.value.value
    assert fix in error.value.fix


def test_each_fix_of_the_ranks_works() -> None:
    """The layout with the named change has no problem left."""

    def problems(layout: Layout, world_size: int) -> list[InputError]:
        return layout.problems(BIG, world_size=world_size, sequence_length=8192)

    tried = 0
    for ep, etp, pp, cp, dp, world_size in itertools.product(
        (1, 8), (1, 2), (1, 2), (1, 4), (None, 1, 3, 8), (1, 3, 8, 12, 256)
    ):
        layout = Layout(ep=ep, etp=etp, pp=pp, cp=cp, dp=dp)
        for problem in problems(layout, world_size):
            for fix in re.split(", or (?!lower)", problem.fix.partition(", or lower")[0]):
                changed = layout
                for key, value in re.findall(r"layout\.(\w+)=(\w+)", fix):
                    new = None if value == "null" else int(value)
                    changed = dataclasses.replace(changed, **{key: new})
                found = re.search(r"start (\d+)(?: or (\d+))? ranks", fix)
                for ranks in filter(None, found.groups() if found else (world_size,)):
                    assert not problems(changed, int(ranks)), f"{layout}, {world_size}: {problem}"
                    tried += 1
    assert tried > 300


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ep": 0}, "layout.ep=0"),
        ({"tp": 2}, "layout.tp=2 with layout.sp=false"),
        ({"sp": True}, "layout.sp=true with layout.tp=1"),
        ({"vpp": 2}, "layout.vpp=2 with layout.pp=1"),
    ],
)
def test_impossible_combinations_cannot_be_made(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        Layout(**fields)


def test_problems_agree_with_megatrons_divisibility() -> None:
    """Every layout of up to 16 ranks is accepted exactly when Megatron's assertions hold."""
    accepted = 0
    for tp, pp, ep, etp, cp in itertools.product(
        (1, 2, 4), (1, 2, 3, 4), (1, 2, 3, 8), (1, 2), (1, 2, 3)
    ):
        layout = Layout(tp=tp, sp=tp > 1, pp=pp, ep=ep, etp=etp, cp=cp)
        for world_size in (1, 2, 4, 8, 12, 16):
            fits = (
                world_size % (tp * pp * cp) == 0
                and world_size % (ep * etp * pp) == 0
                and TINY.num_attention_heads % tp == 0
                and TINY.num_key_value_heads % tp == 0
                and TINY.num_hidden_layers % pp == 0
                and TINY.num_experts % ep == 0
                and (cp == 1 or 256 % (2 * cp) == 0)
            )
            assert (
                not layout.problems(TINY, world_size=world_size, sequence_length=256)
            ) == fits, (layout, world_size)
            accepted += fits
            if fits:
                assert world_size % layout.smallest_world_size == 0
                assert layout.data_parallel(world_size) * tp * pp * cp == world_size
                assert layout.expert_data_parallel(world_size) * ep * etp * pp == world_size
    assert accepted > 50
    assert Layout(tp=2, sp=True, cp=2, ep=8, pp=3).smallest_world_size == 24
    assert Layout(ep=2, dp=3).smallest_world_size == 6
    assert (Layout(ep=8, dp=256).world_size, Layout().world_size) == (256, None)


def test_sliding_layers_gather_and_full_layers_pass_on() -> None:
    assert Layout(cp=8).cp_comm_types(BIG) == ("all_gather", "all_gather", "all_gather", "p2p") * 7
    first_full = BIG.replace(layer_types=("full_attention", "sliding_attention") * 14)
    # the MTP layer reads entry 0, and it slides
    assert (
        Layout(cp=8).cp_comm_types(first_full)
        == ("all_gather", "all_gather") + ("p2p", "all_gather") * 13
    )
    without_mtp = first_full.replace(num_mtp_layers=0)
    assert Layout(cp=8).cp_comm_types(without_mtp) == ("p2p", "all_gather") * 14
