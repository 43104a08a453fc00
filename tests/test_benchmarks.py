"""benchmarks/train_step.py: the small mode end to end, the choice of arms, the time by part."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import train_step, train_step_arm
from benchmarks.train_step_profile import PARTS, named_parts, profiled
from mellum2_megatron.architecture import Mellum2Architecture
from tests import REPOSITORY

OURS, THEIRS = "torch-bf16-muon-mtp", "transformers-bf16-adam"
MACHINE = {"versions": {"transformer-engine": "2.20.2"}, "memory_bytes": 80 * 2**30}


@pytest.mark.slow
def test_the_small_mode_measures_and_disclaims_its_figures(tmp_path: Path) -> None:
    words = f"--small --warmup 1 --steps 2 --arms {OURS} {THEIRS} --output {tmp_path}".split()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mean nothing about speed on GPUs" in done.stdout
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["mode"] == "small"
    assert results["reference"] is None
    assert len(results["gemm"]["runs"]) == 2
    assert results["slice"] | {"parameters": 0} == {
        "recipe": "mellum2_tiny_pretrain",
        "layers": 4,
        "parameters": 0,
        "sequence_length": 256,
        "micro_batch": 4,
        "batch": 4,
        "ranks": 1,
        "warmup_steps": 1,
        "timed_steps": 2,
    }
    assert all(word in results["command"] for word in words)

    tiny = Mellum2Architecture.preset("mellum2-tiny")
    measured = {arm["arm"]: arm for arm in results["arms"] if arm["status"] == "measured"}
    assert list(measured) == [OURS, THEIRS]
    for name, mtp in ((OURS, True), (THEIRS, False)):
        arm = measured[name]
        assert len(arm["seconds"]) == len(arm["cpu_seconds"]) == 2
        assert min(arm["seconds"]) <= arm["median_seconds"] <= max(arm["seconds"])
        assert arm["tokens_per_second"] * arm["median_seconds"] == pytest.approx(4 * 256)
        per_token = arm["model_flops_per_second"] / arm["tokens_per_second"]
        assert per_token == pytest.approx(sum(tiny.flops_by_component(256, mtp).values()) / 256)
        gemm = results["gemm"]["flops_per_second"]
        assert arm["share_of_gemm"] == pytest.approx(arm["model_flops_per_second"] / gemm)
        assert (arm["estimated_memory_bytes"] is None) is (name == THEIRS)
        assert arm["peak_memory_bytes"] > tiny.num_parameters(mtp=mtp) * 2
        share = arm["profile"]["share"]
        assert tuple(share) == PARTS
        assert sum(share.values()) == pytest.approx(1)
        assert all(share[part] > 0 for part in PARTS if part not in ("communication", "other"))
        # Two products with the vocabulary in each head, the largest of the model.
        assert share["vocabulary and loss"] > 0.1
    missing = {
        arm["arm"]: arm["reason"] for arm in results["arms"] if arm["status"] == "not measured"
    }
    assert set(missing) == {arm.name for arm in train_step.ARMS if arm.backend == "te"}
    assert set(missing.values()) == {"needs a GPU with Transformer Engine"}


def test_backward_operators_belong_to_their_forward_modules_part() -> None:
    """`addmm` runs in forward only, `mm` in backward only, and both only in the experts."""
    model = torch.nn.ModuleDict(
        {"norm": torch.nn.LayerNorm(256), "experts": torch.nn.Linear(256, 256)}
    )

    def step() -> None:
        model["experts"](model["norm"](torch.randn(512, 256))).exp().sum().backward()

    with named_parts(model):
        profile = profiled(step, cuda=False, largest=1000)
    share, top = profile["share"], profile["top"]
    assert share["grouped GEMM"] >= top["aten::mm"] + top["aten::addmm"]
    assert share["norm"] >= top["aten::native_layer_norm_backward"] > 0
    assert not model["experts"]._forward_hooks


def plan(*words: str, small: bool = False, te: bool = True) -> tuple[list[str], dict[str, str]]:
    versions = {"transformer-engine": "2.20.2" if te else None}
    options = train_step._parser().parse_args(list(words))
    specs, left_out = train_step._plan(options, small, MACHINE | {"versions": versions})
    return [spec.name for spec in specs], left_out


def test_the_first_arm_runs_first_in_the_middle_and_last() -> None:
    names, left_out = plan()
    assert not left_out
    assert [position for position, name in enumerate(names) if name == names[0]] == [
        0,
        4,
        len(names) - 1,
    ]
    assert set(names) == {arm.name for arm in train_step.ARMS}


@pytest.mark.parametrize(("small", "te"), [(True, True), (False, False)])
def test_without_transformer_engine_or_gpu_te_arms_are_named_as_missing(
    small: bool, te: bool
) -> None:
    names, left_out = plan("--tune", small=small, te=te)
    assert not any(name.startswith("te-") for name in names)
    assert set(left_out) == {
        arm.name for arm in (*train_step.ARMS, *train_step.TUNING) if arm.backend == "te"
    }


def test_the_slice_grows_with_the_memory() -> None:
    """In whole periods of four layers, as far as the GPU's memory allows."""
    small, large = (
        train_step._fitting_layers(train_step.ARMS[0], gib * 2**30) for gib in (79, 139)
    )
    assert (small, large) == (4, 8)


def test_a_variant_removes_only_words_of_the_command_line() -> None:
    from mellum2_megatron.upstream import megatron_arguments

    for spec in train_step.TUNING:
        words = megatron_arguments(spec.run, world_size=1, device="cuda", backend="te")
        assert set(spec.without) <= set(words)
        assert spec.words or spec.without or spec.overrides
        base = next(arm for arm in train_step.ARMS if arm.name == spec.name.partition("/")[0])
        changed = dataclasses.replace(spec, name=base.name)
        assert (changed.run != base.run) == bool(spec.overrides)


def test_arms_have_the_environment_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapped exchanges without their hardware queues would be measured as slow."""
    from mellum2_megatron.upstream import gpu_environment

    arms = {arm.name: arm for arm in (*train_step.ARMS, *train_step.TUNING)}
    arms |= {arm.name: dataclasses.replace(arm, ranks=2) for arm in train_step.EXCHANGES}
    for name, variable, value in (
        ("te-bf16-muon-mtp", "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
        ("te-bf16-muon-mtp/overlap", "CUDA_DEVICE_MAX_CONNECTIONS", "32"),
        ("te-bf16-muon-mtp/deterministic", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0"),
    ):
        monkeypatch.setattr(os, "environ", {"NCCL_GRAPH_REGISTER": "1"})
        train_step_arm.set_environment(arms[name])
        assert os.environ[variable] == value
        assert os.environ["NCCL_GRAPH_REGISTER"] == "1", "the user's wins"
        assert set(gpu_environment(arms[name].run)) <= set(os.environ)
    monkeypatch.setattr(os, "environ", {})
    train_step_arm.set_environment(dataclasses.replace(arms["torch-bf16-muon-mtp"], small=True))
    train_step_arm.set_environment(arms["transformers-bf16-adam"])
    assert not os.environ


def test_variants_of_the_exchange_need_several_ranks() -> None:
    overlap = "te-bf16-muon-mtp/overlap"
    names, left_out = plan("--tune", "--ranks", "8", "--arms", "te-bf16-muon-mtp", overlap)
    assert names == ["te-bf16-muon-mtp", overlap]
    assert left_out == {"transformers-bf16-adam": "runs in one process"}
    with pytest.raises(train_step.InputError, match="there is no such arm"):
        plan("--tune", "--arms", overlap)
    for spec in train_step.EXCHANGES:
        layout = dataclasses.replace(spec, ranks=8).run.layout
        assert (layout.ep, layout.dp) == (8, 8)
        assert layout.overlap_expert_comm or layout.dispatcher == "flex"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_share_the_experts_and_rates_are_those_of_one(tmp_path: Path) -> None:
    words = "--small --warmup 1 --steps 1 --ranks 2 --arms".split()
    words += [OURS, "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    (arm,) = (arm for arm in results["arms"] if arm["status"] == "measured")
    assert results["slice"]["ranks"] == 2
    assert results["slice"]["batch"] == 8
    assert arm["tokens_per_second"] * arm["median_seconds"] == pytest.approx(4 * 256)
    assert arm["profile"]["share"]["communication"] > 0


def test_a_rank_that_fails_ends_the_others() -> None:
    sleeps, fails = "import time; time.sleep(600)", "raise SystemExit(3)"
    ranks = [subprocess.Popen([sys.executable, "-c", code]) for code in (sleeps, fails)]
    assert train_step._wait(ranks, 60) == 3
    assert all(rank.returncode is not None for rank in ranks)
    late = [subprocess.Popen([sys.executable, "-c", sleeps])]
    assert train_step._wait(late, 0.2) is None
    assert late[0].returncode is not None


def test_an_unknown_arm_is_refused_with_a_list_of_the_arms() -> None:
    with pytest.raises(train_step.InputError, match="te-bf16-muon-mtp"):
        plan("--arms", "te-bf16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 0", "argument --steps: 0: must be 1 or more"),
        ("--layers 0", "argument --layers: 0: must be 1 or more"),
        ("--warmup -1", "argument --warmup: -1: must be 0 or more"),
        ("--batch x", "argument --batch: invalid int value: 'x'"),
        ("--timeout nan", "argument --timeout: nan: must be 1 or more"),
        ("--smal", "unrecognized arguments: --smal"),
    ],
)
def test_a_wrong_option_is_one_message(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        train_step._parser().parse_args(words.split())
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--batch", "3"], "use 4 sequences"), (["--ranks", "3"], "use layout.ep=2 or 4")],
)
def test_sizes_that_no_arm_can_have_are_refused_before_the_arms(
    words: list[str], message: str
) -> None:
    with pytest.raises(train_step.InputError, match=message):
        plan(*words, small=True)
