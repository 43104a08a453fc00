"""A run against a card: refused if it cannot fit, with settings that the same count accepts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launchers.job import plan_job
from launchers.profile import Profile, profile_from_yaml
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import apply_overrides
from mellum2_megatron.planning.gpus import GPUS
from mellum2_megatron.planning.memory import memory_per_rank
from mellum2_megatron.planning.memory_fit import card_problem, memory_note
from mellum2_megatron.planning.rules import check, enforce
from mellum2_megatron.recipes import recipe
from tests.cli.runner import mellum2

PLAIN = "mellum2_12b_pretrain_phase1"
H100 = "mellum2_12b_pretrain_phase1_256gpu_h100_fp8"


@pytest.mark.parametrize(
    ("name", "ranks", "card"),
    [
        (PLAIN, 256, "h100"),
        ("mellum2_12b_pretrain_phase1_8gpu_h200_bf16", 8, "a100-80"),
        ("mellum2_12b_long_context", 128, "h100"),
        (H100, 256, "l40s"),
        ("mellum2_4layer_pretrain_1gpu_h200_fp8", 1, "a100-40"),
    ],
)
def test_settings_that_are_named_fit_and_break_no_rule(name: str, ranks: int, card: str) -> None:
    run, gpu = recipe(name), GPUS[card]
    (violation,) = check(run, ranks, "cuda", machine=False, gpu=gpu)
    assert violation.rule.name == "memory-fits-the-card"
    problem = card_problem(run, world_size=ranks, gpu=gpu)
    assert problem is not None
    needed = memory_per_rank(run, world_size=ranks).total
    assert f"a rank needs {needed / 2**30:.1f} GiB" in problem.rule
    assert f"the card has {gpu.memory / 2**30:.1f} GiB" in problem.rule
    if name.startswith("mellum2_4layer"):
        # Its optimizer alone leaves no room on 40 GB, and one rank has nobody to share with.
        assert problem.settings == ()
        assert "take more or larger cards" in problem.fix
        return
    assert 1 <= len(problem.settings) <= 3
    for line in problem.settings:
        changed = apply_overrides(run, line.split())
        memory = memory_per_rank(changed, world_size=ranks)
        assert memory.total <= gpu.memory < needed
        assert f"{line} ({memory.total / 2**30:.1f} GiB)" in problem.fix
        assert check(changed, ranks, "cuda", machine=False, gpu=gpu) == []
    # No line has more than another one needs.
    words = [set(line.split()) for line in problem.settings]
    assert not any(one < other for one in words for other in words)


def test_even_shares_are_the_first_remedy() -> None:
    """At 256 ranks they save 13 GiB and break nothing."""
    run = apply_overrides(recipe(H100), ["optimizer.muon_dense_shards=whole"])
    card = dataclasses.replace(GPUS["h100"], memory=52 * 2**30)
    problem = card_problem(run, world_size=256, gpu=card)
    assert problem is not None
    assert problem.settings[0] == "optimizer.muon_dense_shards=even"


def test_the_room_on_a_card_is_all_of_it() -> None:
    run = recipe(PLAIN)
    needed = memory_per_rank(run, world_size=256).total
    exact = dataclasses.replace(GPUS["h100"], memory=needed)
    assert card_problem(run, world_size=256, gpu=exact) is None
    below = dataclasses.replace(exact, memory=needed - 1)
    assert card_problem(run, world_size=256, gpu=below) is not None


def test_without_a_card_memory_is_not_checked() -> None:
    enforce(recipe(PLAIN), 256, "cuda", machine=False)
    with pytest.raises(InputError, match=r"a rank needs 8\d\.\d GiB"):
        enforce(recipe(PLAIN), 256, "cuda", machine=False, gpu=GPUS["h100"])


def test_a_layout_that_does_not_fit_is_the_only_problem() -> None:
    run = apply_overrides(recipe(PLAIN), ["layout.ep=3"])
    names = {found.rule.name for found in check(run, 256, "cuda", machine=False, gpu=GPUS["h100"])}
    assert names == {"layout-fits"}


def test_settings_keep_what_the_run_computes_again() -> None:
    """A run that computes the norms again is not told to stop that."""
    run = apply_overrides(recipe(PLAIN), ["execution.recompute=layernorm"])
    problem = card_problem(run, world_size=256, gpu=dataclasses.replace(GPUS["h100"], memory=6e10))
    assert problem is not None
    recompute = [word for word in " ".join(problem.settings).split() if "recompute" in word]
    assert recompute
    assert all("layernorm" in word for word in recompute)


# -- Commands --------------------------------------------------------------------------------------


def test_doctor_names_settings_in_lines_of_their_own() -> None:
    refused = mellum2("doctor", PLAIN, "--gpu", "h100")
    assert refused.code == 2
    lines = [line for line in refused.out.splitlines() if line.startswith("fits with  ")]
    assert 1 <= len(lines) <= 3
    for line in lines:
        words = line.removeprefix("fits with  ").split()
        accepted = mellum2("doctor", PLAIN, *words, "--gpu", "h100")
        assert accepted.code == 0, accepted.out
    assert "breaks no rule" in accepted.out
    assert " of 79.6 GiB" in accepted.out


def test_info_tells_whether_a_rank_fits() -> None:
    fits = mellum2("info", H100, "--gpu", "h100", "--json")
    card = json.loads(fits.out)["card"]
    assert (fits.code, card["fits"], card["settings"]) == (0, True, [])
    assert card["memory"] == 81_559 * 2**20
    assert "fits H100 SXM: 79.6 GiB" in mellum2("info", H100, "--gpu", "h100").out
    refused = mellum2("info", PLAIN, "--gpu", "h100", "--json")
    card = json.loads(refused.out)["card"]
    assert (refused.code, card["fits"]) == (2, False)
    assert "schedule.micro_batch_size=1" in card["settings"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["doctor", PLAIN, "--gpu", "h10"], "did you mean 'h100'"),
        (["doctor", PLAIN, "--gpu", "h100", "--device", "cpu"], "a card is no CPU"),
        (["info", "mellum2-12b", "--gpu", "h100"], "name a recipe"),
        (["info", PLAIN, "--gpu", "h100", "--optimizer"], "drop one of the two"),
    ],
)
def test_a_card_in_the_wrong_place_is_refused(words: list[str], named: str) -> None:
    mellum2(*words).refused(named)


def test_a_profile_names_a_card() -> None:
    text = "account: none\ngpus_per_node: 8\ngpu: {}\n"
    profile = profile_from_yaml(text.format("h100"), name="site")
    assert profile.card is GPUS["h100"]
    with pytest.raises(InputError, match=r"gpu: h1000: no such GPU is known.*did you mean"):
        profile_from_yaml(text.format("h1000"), name="site")
    plan_job(recipe(H100), profile)
    with pytest.raises(InputError, match="a rank needs"):
        plan_job(recipe(PLAIN), profile)
    with pytest.raises(InputError, match="gpu: h100 with ranks on CPUs"):
        plan_job(recipe("mellum2_tiny_pretrain"), Profile(name="x", account="none", gpu="h100"))


def test_launch_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text("account: none\ngpus_per_node: 8\ngpu: h200\n")
    words = ["launch", PLAIN, "--profile", "site.yaml", "--dry-run"]
    # Missing data are shown, not raised; the table of memory comes first.
    assert "Pipeline stages" in mellum2(*words).out
    refused = mellum2(*words, "--gpu", "h100")
    refused.refused("a rank needs")
    assert "schedule.micro_batch_size=1" in refused.err
    assert not (tmp_path / "runs").exists()


def test_without_a_card_the_cards_that_have_enough_are_named() -> None:
    run = recipe(PLAIN)
    note = memory_note(run, world_size=256)
    for name, card in GPUS.items():
        fits = card_problem(run, world_size=256, gpu=card) is None
        assert (name in note.rpartition(":")[2]) == fits
    assert "h200" in note
    larger = apply_overrides(run, ["schedule.micro_batch_size=16"])
    assert memory_note(larger, world_size=256).endswith("no known card has enough.")
