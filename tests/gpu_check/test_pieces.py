"""Pieces of the GPU check one by one, on machines and results made up here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp

from mellum2_megatron.config import apply_overrides
from mellum2_megatron.data.feed.sources import check_data
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.gpu_check import correctness, hardware, machine, speed
from mellum2_megatron.gpu_check.piece import (
    Outcome,
    PieceError,
    SkipPiece,
    Workplace,
    result_file,
)
from mellum2_megatron.planning.rules import check
from mellum2_megatron.recipes import recipe
from tests import REPOSITORY

GPU = {"name": "NVIDIA H100", "memory_bytes": 80 * 2**30, "capability": [9, 0]}
MACHINE = {
    "gpus": [GPU],
    "transformer_engine": "2.20.2",
    "fp8": None,
    "kernels": dict.fromkeys(machine.KERNELS, True),
}


def workplace(folder: Path, **changes: Any) -> Workplace:
    place = Workplace(
        folder=folder,
        rehearsal=False,
        machine=MACHINE,
        checkout=REPOSITORY,
        deadline=time.monotonic() + 60,
    )
    return dataclasses.replace(place, **changes)


# -- Commands --------------------------------------------------------------------------------------


def test_a_command_that_fails_is_reported_by_its_error_line(tmp_path: Path) -> None:
    program = "print('loading'); raise ValueError('no such kernel')"
    with pytest.raises(PieceError, match=r"probe: exit code 1: ValueError: no such kernel \(see"):
        workplace(tmp_path).run("probe", [sys.executable, "-c", program])
    assert "loading" in (tmp_path / "logs" / "probe.log").read_text()


def is_alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("session", ["", "setsid"], ids=["same session", "own session"])
def test_a_command_ends_at_the_deadline_with_its_children(session: str, tmp_path: Path) -> None:
    """Ranks have sessions of their own, which a signal to the command's group does not reach."""
    number = tmp_path / "number"
    program = f"{session} sleep 600 & echo $! > {number}; wait"
    place = workplace(tmp_path, deadline=time.monotonic() + 3)
    with pytest.raises(PieceError, match="slow: not done in time"):
        place.run("slow", ["sh", "-c", program])
    child, end = int(number.read_text()), time.monotonic() + 30
    while is_alive(child):
        assert time.monotonic() < end, "the child goes on"
        time.sleep(0.05)


# -- Exactness -------------------------------------------------------------------------------------

STEP = {"lm_loss": 8.0, "mtp_loss": 8.0, "aux_loss": 1.0, "z_loss": 4.0, "grad_norm": 2.0}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, []),
        ({"lm_loss": 8.007}, []),
        ({"lm_loss": 8.009}, ["lm_loss"]),
        ({"grad_norm": 2.019}, []),
        ({"grad_norm": 2.021}, ["grad_norm"]),
        ({"z_loss": float("nan")}, ["z_loss"]),
    ],
)
def test_losses_agree_to_a_share_and_norms_to_ten_times_that(
    change: dict[str, float], wrong: list[str]
) -> None:
    one, other = {1: STEP, 2: STEP}, {1: STEP | change, 2: STEP}
    differences, lines = correctness.compare_losses(one, other, 1e-3)
    assert set(differences) == set(STEP)
    assert [line.split()[0] for line in lines] == wrong


def test_a_missing_step_is_a_failure(tmp_path: Path) -> None:
    line = {"kind": "train", "step": 1, **STEP}
    for name in ("straight", "torch"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")
    one, other = tmp_path / "straight", tmp_path / "torch"
    assert correctness._compare(one, other, [1], 1e-3).status == "passed"
    with pytest.raises(PieceError, match="has no 2"):
        correctness._compare(one, other, [1, 2], 1e-3)


def test_logit_errors_are_medians_without_the_last_mtp_position(tmp_path: Path) -> None:
    exact = np.random.default_rng(0).normal(size=(1, 5, 7)).astype(np.float32)
    rounded = exact * np.float32(1.01)
    rounded[0, 2] += 5  # one token that went to another expert
    mtp = exact * np.float32(1.02)
    mtp[0, 4] = 99  # undefined
    np.savez(tmp_path / "exact.npz", logits=exact, mtp_logits=exact)
    np.savez(tmp_path / "rounded.npz", logits=rounded, mtp_logits=mtp)
    errors = correctness.logit_errors(tmp_path / "exact.npz", tmp_path / "rounded.npz")
    assert errors == pytest.approx({"logits": 0.01, "mtp_logits": 0.02}, rel=1e-4)


def test_logits_of_te_are_held_to_the_error_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = np.random.default_rng(0).normal(size=(1, 5, 7)).astype(np.float32)
    scales = {("torch", "float32"): 1.0, ("torch", "bfloat16"): 1.01, ("te", "bfloat16"): 1.014}

    def score(place: Workplace, run: Path, tokens: Path, backend: str, dtype: str) -> Path:
        out = place.work / f"{backend}_{dtype}.npz"
        np.savez(out, logits=exact * np.float32(scales[backend, dtype]))
        return out

    class Checkpoint:
        class architecture:  # noqa: N801
            vocab_size = 7

    monkeypatch.setattr(correctness, "_score", score)
    monkeypatch.setattr(correctness, "find_checkpoint", lambda run: Checkpoint)
    (tmp_path / "work").mkdir()
    assert correctness.logits(workplace(tmp_path)).status == "passed"
    scales["te", "bfloat16"] = 1.016
    outcome = correctness.logits(workplace(tmp_path))
    assert outcome.status == "failed"
    assert outcome.reason == "te: logits off by 0.016, allowed 0.015"


def write_checkpoint(folder: Path, weight: float = 1.0, moment: float = 0.0) -> None:
    """Write a checkpoint of two tensors and an object, which may differ from run to run."""
    tensors = {"weight": torch.full((3,), weight), "optimizer.moment": torch.full((3,), moment)}
    state = {**tensors, "common": str(folder)}
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def test_checkpoints_are_compared_to_the_bit(tmp_path: Path) -> None:
    one, same, other, less = (tmp_path / name for name in ("one", "same", "other", "less"))
    write_checkpoint(one)
    write_checkpoint(same)
    write_checkpoint(other, moment=-0.0)
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=less, no_dist=True)
    assert correctness.differing_tensors(one, same) == ([], 2)
    assert correctness.differing_tensors(one, other) == (["optimizer.moment"], 2)
    with pytest.raises(PieceError, match="hold different tensors"):
        correctness.differing_tensors(one, less)


def test_before_hopper_deterministic_mode_is_skipped_without_flash_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ampere = MACHINE | {"gpus": [GPU | {"name": "NVIDIA A100", "capability": [8, 0]}]}
    place = workplace(tmp_path, machine=ampere)
    found: list[Any] = [None]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[0])
    for run in (correctness.deterministic, lambda at: speed.measure(at, "speed_deterministic")):
        with pytest.raises(SkipPiece, match=r"before Hopper .* is not installed"):
            run(place)
    found[0] = object()
    assert place.deterministic_lacks is None
    assert workplace(tmp_path).deterministic_lacks is None


@pytest.mark.parametrize(("gpus", "ranks"), [(1, "1"), (3, "2"), (8, "8")])
@pytest.mark.parametrize("broken", ["", "resumed", "again"])
def test_deterministic_runs_are_held_to_every_bit(
    gpus: int, ranks: str, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs of the same settings on all GPUs; a moment of the optimizer is enough to fail."""
    commands: list[tuple[str, ...]] = []

    def mellum2(self: Workplace, name: str, *words: str) -> str:
        commands.append(words)
        run = Path(words[words.index("--output") + 1])
        steps = range(3 if name == "train_resumed" else 1, 5)
        run.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"kind": "train", "step": step, **STEP}) for step in steps]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        for step in {4} if name == "train_again" else {2, 4} & set(steps):
            wrong = name == f"train_{broken}"
            write_checkpoint(run / f"iter_{step:07}", moment=float(wrong))
        return ""

    monkeypatch.setattr(Workplace, "mellum2", mellum2)
    place = workplace(tmp_path, machine=MACHINE | {"gpus": [GPU] * gpus})
    outcome = correctness.deterministic(place)
    assert [words[words.index("--nproc") + 1] for words in commands] == [ranks] * 3
    for words in commands:
        assert "execution.deterministic=true" in words
        assert f"layout.ep={ranks}" in words
        overrides = list(words[words.index("--output") + 2 :])
        run = apply_overrides(recipe(correctness._recipe(place)), overrides)
        assert check(run, int(ranks), "cuda", machine=False) == []
    (line,) = outcome.decides
    assert line.endswith(f"on {ranks} GPU(s)")
    assert ("does not repeat" in line) == bool(broken)
    what = "run again" if broken == "again" else broken
    assert outcome.reason == (f"{what}: share of stored tensors differs" if broken else "")
    assert outcome.status == ("failed" if broken else "passed")
    # What takes disk is gone.
    assert list(place.work.iterdir()) == []


def test_the_small_model_of_a_gpu_breaks_no_rule_and_fits_its_data(
    tmp_path: Path, small_data: PreparedData
) -> None:
    place = workplace(tmp_path)
    place.work.mkdir()
    (place.work / "data").symlink_to(small_data.path)
    run = apply_overrides(
        recipe(correctness._recipe(place)), [*correctness._settings(place), "backend=te"]
    )
    for word in ("precision.compute=bf16", "precision.compute=fp8", "backend=torch"):
        assert check(apply_overrides(run, [word]), 1, "cuda", machine=False) == []
    # The corpus of the check is packed, this one is not.
    assert check_data(apply_overrides(run, ["data.document_attention=false"])).train
    full = recipe("mellum2_12b_pretrain_phase1").architecture
    for width in ("hidden_size", "num_attention_heads", "head_dim", "moe_intermediate_size"):
        assert getattr(run.architecture, width) == getattr(full, width)


# -- The machine -----------------------------------------------------------------------------------


def test_a_missing_kernel_or_engine_fails_the_environment(tmp_path: Path) -> None:
    assert hardware.environment(workplace(tmp_path)).status == "passed"
    kernels = MACHINE["kernels"] | {"router": False}
    outcome = hardware.environment(workplace(tmp_path, machine=MACHINE | {"kernels": kernels}))
    assert (outcome.status, outcome.reason) == (
        "failed",
        "Transformer Engine has no kernel for: router",
    )
    absent = MACHINE | {"transformer_engine": None, "transformer_engine_error": "OSError: x"}
    outcome = hardware.environment(workplace(tmp_path, machine=absent))
    assert outcome.status == "failed"
    assert "make setup-te" in outcome.reason


def test_fp8_that_does_not_work_decides_the_precision(tmp_path: Path) -> None:
    old = workplace(tmp_path, machine=MACHINE | {"fp8": "compute capability 8.9 is needed"})
    assert hardware.environment(old).decides == (
        "`precision.compute`: bf16, for FP8 does not work (compute capability 8.9 is needed)",
    )
    with pytest.raises(SkipPiece, match=r"8\.9"):
        correctness.fp8(old)
    with pytest.raises(SkipPiece, match=r"8\.9"):
        speed.measure(old, "speed_precision")


REPORT = """<testsuites><testsuite>
<testcase name="test_layout[nccl-tp2]"/>
<testcase name="test_layout[nccl-cp2]">{cp2}</testcase>
<testcase name="test_layout[nccl-ep4]"><skipped message="4 GPUs needed, 2 here"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(("cp2", "status"), [("", "passed"), ("<failure/>", "failed")])
def test_layouts_are_listed_by_result(
    cp2: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{hardware.LAYOUT_TESTS}::test_layout[nccl-{number}]" for number in range(7)]
    ran: list[str] = []

    def run(self: Workplace, name: str, command: Any, **options: Any) -> str:
        if "--collect-only" in command:
            assert command[-2:] == ["-m", "gpu"]
            return "\n".join([*names, "", "7/70 tests collected"])
        ran.extend(word for word in command if "::" in word)
        (tmp_path / f"{name}.xml").write_text(REPORT.format(cp2=cp2))
        return ""

    monkeypatch.setattr(Workplace, "run", run)
    for part in range(hardware.LAYOUT_PARTS):
        outcome = hardware.layouts(workplace(tmp_path), part)
        assert outcome.status == status
        assert outcome.reason == ("differ from one process: nccl-cp2" if cp2 else "")
        assert outcome.figures["skipped"] == ["nccl-ep4"]
    # The parts together run each layout once.
    assert sorted(ran) == names


def test_the_names_of_kernels_are_megatrons() -> None:
    """Each is a name that the module binds, to None where Transformer Engine lacks the kernel."""
    import megatron.core.extensions as extensions

    source = Path(extensions.__path__[0], "transformer_engine.py").read_text()
    for name in machine.KERNELS.values():
        assert f"class {name}(" in source or f" {name} = " in source or f"def {name}(" in source


# -- Speed and memory ------------------------------------------------------------------------------


def test_exchanges_are_measured_on_as_many_gpus_as_share_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(gpus: int, piece: str = "speed_overlap") -> list[str]:
        commands: list[list[str]] = []

        def run(self: Workplace, name: str, command: list[str], **options: Any) -> str:
            commands.append(command)
            raise PieceError("stop here")

        monkeypatch.setattr(Workplace, "run", run)
        with pytest.raises(PieceError, match="stop here"):
            speed.measure(workplace(tmp_path, machine=MACHINE | {"gpus": [GPU] * gpus}), piece)
        return commands[0]

    for gpus, ranks in ((2, "2"), (3, "2"), (4, "4"), (8, "8"), (16, "8")):
        command = measured(gpus)
        assert command[command.index("--ranks") + 1] == ranks
    assert "--ranks" not in measured(8, "speed_heads")
    with pytest.raises(SkipPiece, match="1 GPU: an exchange needs two or more"):
        speed.measure(workplace(tmp_path), "speed_overlap")
    monkeypatch.setattr(speed, "missing_dispatcher", lambda backend: f"no {backend} here")
    eight = workplace(tmp_path, machine=MACHINE | {"gpus": [GPU] * 8})
    with pytest.raises(SkipPiece, match="no hybridep here"):
        speed.measure(eight, "speed_dispatcher")


def test_a_benchmark_without_results_is_not_judged_by_those_of_an_earlier_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark ends with 1 where the matrix product fails, and writes nothing."""
    place = workplace(tmp_path)
    old = place.work / "speed_heads" / "results.json"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps(results(1.0, 1.0, 1.0)))
    said = "the matrix product failed: exit code 1: RuntimeError: no kernel image\n"
    monkeypatch.setattr(Workplace, "run", lambda *_, **__: said)
    with pytest.raises(PieceError, match=r"speed_heads: .* no results: .*no kernel image"):
        speed.measure(place, "speed_heads")


CHOICE = speed.CHOICES["speed_recompute"]


def arm(name: str, seconds: float, memory: int, status: str = "measured") -> dict[str, Any]:
    return {
        "arm": name,
        "status": status,
        "reason": "out of memory",
        "median_seconds": seconds,
        "tokens_per_second": 1 / seconds,
        "model_flops_per_second": 4e14,
        "share_of_gemm": 0.5,
        "peak_memory_bytes": memory,
        "estimated_memory_bytes": memory,
        "least_memory_bytes": memory,
        "profile": {},
    }


def results(first: float, second: float, again: float, status: str = "measured") -> dict[str, Any]:
    one, other = CHOICE.arms
    return {
        "slice": {"layers": 4, "ranks": 1},
        "gemm": {"flops_per_second": 8e14},
        "arms": [
            arm(one, first, 8 * 2**30),
            arm(other, second, 5 * 2**30, status),
            arm(one, again, 8 * 2**30),
        ],
        "drift": {one: max(first, again) / min(first, again) - 1},
    }


def test_a_difference_beyond_the_drift_decides() -> None:
    outcome = speed.judge(CHOICE, results(1.0, 1.25, 1.02))
    assert outcome.figures["gain of the second"] == pytest.approx(1.01 / 1.25 - 1)
    assert outcome.figures["drift of the first"] == pytest.approx(0.02)
    assert outcome.decides == (
        "`execution.recompute`: [] is faster; [moe_act] has -19.2% speed (drift 2.0%) "
        "and 3.22 GB less memory",
    )


def test_a_difference_within_the_drift_decides_nothing_about_speed() -> None:
    (line,) = speed.judge(CHOICE, results(1.0, 1.05, 1.2)).decides
    assert "[] and [moe_act] are equally fast" in line
    assert "[moe_act] takes 3.22 GB less memory" in line
    assert speed.judge(CHOICE, results(1.0, 1.05, 1.2), rehearsal=True).decides == ()


def test_an_arm_that_fails_fails_the_piece() -> None:
    with pytest.raises(PieceError, match="recompute-act: out of memory"):
        speed.judge(CHOICE, results(1.0, 1.0, 1.0, status="failed"))


def test_every_choice_is_measured_by_arms_of_the_benchmark() -> None:
    from benchmarks.train_step import ARMS, EXCHANGES, SMALL_ARMS, TUNING
    from mellum2_megatron.config import keys

    known = {spec.name: spec for spec in (*ARMS, *SMALL_ARMS, *TUNING)}
    known |= {spec.name: dataclasses.replace(spec, ranks=8) for spec in EXCHANGES}
    for choice in (*speed.CHOICES.values(), speed.REHEARSED):
        assert choice.key in keys()
        section, name = choice.key.split(".")
        for value, arm_name in zip(choice.values, choice.arms, strict=True):
            found = getattr(getattr(known[arm_name].run, section), name)
            text = f"[{', '.join(found)}]" if isinstance(found, tuple) else json.dumps(found)
            assert text.strip('"') == value


@pytest.mark.parametrize(
    ("measured", "status"),
    [(1.0, "passed"), (1.04, "passed"), (0.77, "passed"), (0.75, "failed"), (1.06, "failed")],
)
def test_memory_outside_of_its_bounds_fails(measured: float, status: str, tmp_path: Path) -> None:
    place = workplace(tmp_path)
    with pytest.raises(SkipPiece, match="no arm"):
        speed.memory(place)
    file = result_file(tmp_path, "speed_heads")
    file.parent.mkdir()
    bounds = {"least memory": 0.8 * 2**30, "estimated memory": 2**30}
    arms = {"loss.head_chunk=null": {"peak memory": measured * 2**30, **bounds}}
    outcome = Outcome(status="passed", figures={"arms": arms})
    file.write_text(json.dumps(dataclasses.asdict(outcome)))
    found = speed.memory(place)
    assert found.status == status
    assert f"{measured:.2f} times the estimate" in found.decides[0]
