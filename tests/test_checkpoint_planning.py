"""benchmarks/checkpoint_planning.py: the tiny recipe on four ranks that nobody runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from mellum2_megatron.config import apply_overrides
from mellum2_megatron.planning.rank_weights import local_weights, uses_muon
from mellum2_megatron.recipes import recipe
from tests import REPOSITORY

TINY = "mellum2_tiny_pretrain"


@pytest.mark.slow
def test_all_ranks_together_store_the_model_and_its_state() -> None:
    """Bytes by the architecture's list of weights; Megatron's own checks of the plans pass."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.checkpoint_planning", "--recipe", TINY, "--ranks", "4"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| save |") == 5
    assert done.stdout.count("| load |") == 4
    stored = float(re.findall(r"the checkpoint (\S+) GB\.", done.stdout)[0])
    rows = re.findall(r"\| ([^|]+) \| (\d) \| (\S+) \| (\S+) \| (\S+) \|", done.stdout)
    assert [(name, groups) for name, groups, *_ in rows] == [
        ("every rank for itself", "4"),
        ("the ranks with the same experts", "2"),
        ("the data-parallel group", "1"),
    ]
    # Gigabytes that all ranks read, that one reads, and that one receives.
    alone, pairs, all_four = ([float(value) for value in row[2:]] for row in rows)
    run = recipe(TINY)
    whole = apply_overrides(run, ["layout.ep=1"])
    weights = list(local_weights(run.architecture, whole.layout, "torch"))
    muon = sum(weight.numel for weight in weights if uses_muon(weight, run.optimizer))
    adam = sum(weight.numel for weight in weights) - muon
    # BF16 weights; FP32 masters with one moment or two.
    assert stored * 1e9 == pytest.approx(muon * (2 + 8) + adam * (2 + 12), rel=0.01)
    experts = sum(weight.numel for weight in weights if weight.component == "experts")
    dense = muon + adam - experts
    # Every rank reads its weights and all of Adam's state; each matrix's state has one reader.
    copies = 4 * (2 * dense + 12 * adam) + 4 // run.layout.ep * 2 * experts
    assert alone[0] * 1e9 == pytest.approx(copies + 8 * muon, rel=0.01)
    assert alone[2] == 0
    # Two pairs, in each of which one rank sends the other half of what both asked for.
    asked = 2 * dense + experts + 12 * adam
    assert pairs[0] * 1e9 == pytest.approx(2 * asked + 8 * muon, rel=0.01)
    assert pairs[2] * 1e9 == pytest.approx(asked / 2, rel=0.02)
    # All four receive the experts of both pairs.
    assert all_four[0] == stored
    assert all_four[2] * 1e9 == pytest.approx(3 / 4 * (asked + experts), rel=0.02)
    for total, each, _ in (alone, pairs, all_four):
        assert each == pytest.approx(total / 4, rel=0.01)
