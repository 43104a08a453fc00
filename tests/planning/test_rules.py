"""Rules: each fails for its own bad combination, names the values, and holds after its fix."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mellum2_megatron.checkpoint.folder import RUN_FILE, TRACKER_FILE
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Device, Run, apply_overrides, to_yaml
from mellum2_megatron.planning import rules
from mellum2_megatron.planning.rules import RULES, check, enforce
from mellum2_megatron.recipes import recipe
from tests import parameter_id

TINY, BIG = "mellum2_tiny_pretrain", "mellum2_12b_pretrain_phase1"

# recipe, device, ranks, overrides that break the rule, name of the rule, part of the value, and
# overrides that apply its fix
CASES: list[tuple[str, Device, int, list[str], str, str, list[str]]] = [
    (
        TINY,
        "cpu",
        3,
        [],
        "layout-fits",
        "layout.ep=2",
        ["layout.ep=1", "schedule.micro_batch_size=1"],
    ),
    (TINY, "cpu", 2, ["layout.ep=3"], "layout-fits", "layout.ep=3", ["layout.ep=2"]),
    (
        TINY,
        "cpu",
        2,
        ["data.sequence_length=1024"],
        "sequence-in-context",
        "data.sequence_length=1024",
        ["data.sequence_length=512"],
    ),
    (
        TINY,
        "cpu",
        2,
        ["schedule.micro_batch_size=16"],
        "batches-divide",
        "8 sequences",
        ["schedule.micro_batch_size=2"],
    ),
    (
        TINY,
        "cpu",
        2,
        ["logging.eval_batch_size=9"],
        "batches-divide",
        "logging.eval_batch_size=9",
        ["logging.eval_batch_size=8"],
    ),
    (
        TINY,
        "cpu",
        8,
        ["layout.ep=1", "layout.pp=4", "layout.vpp=2", "architecture.num_hidden_layers=8"],
        "interleaving-divides",
        "1 micro-batches a step",
        ["layout.vpp=1"],
    ),
    (
        BIG,
        "cuda",
        256,
        ["precision.fp8_param_gather=true"],
        "muon-gathers-bf16",
        "precision.fp8_param_gather=true",
        ["precision.fp8_param_gather=false"],
    ),
    (
        BIG,
        "cuda",
        256,
        ["precision.bf16_last_layers=8", "layout.pp=4", "layout.dp=64"],
        "bf16-layers-exist",
        "precision.bf16_last_layers=8",
        ["precision.bf16_last_layers=7"],
    ),
    (
        TINY,
        "cpu",
        2,
        ["checkpoint.load=/a", "checkpoint.continue_from=/b"],
        "load-excludes-continue-from",
        "checkpoint.continue_from=/b",
        ["checkpoint.load=null"],
    ),
    (
        BIG,
        "cuda",
        256,
        [
            "optimizer.name=adam",
            "precision.fp8_param_gather=true",
            "precision.bf16_mtp_projection=true",
        ],
        "bf16-projection-gathers-bf16",
        "precision.bf16_mtp_projection=true",
        ["precision.bf16_mtp_projection=false"],
    ),
    (
        BIG,
        "cuda",
        256,
        ["backend=torch"],
        "fp8-has-kernels",
        "backend=torch",
        ["precision.compute=bf16"],
    ),
    (
        TINY,
        "cpu",
        2,
        ["precision.compute=fp8"],
        "fp8-has-kernels",
        "backend=torch",
        ["precision.compute=bf16"],
    ),
    (
        BIG,
        "cuda",
        256,
        ["architecture.moe_intermediate_size=900"],
        "fp8-dimensions",
        "moe_intermediate_size / layout.etp = 900",
        ["architecture.moe_intermediate_size=896"],
    ),
    (TINY, "cpu", 2, ["backend=te"], "cpu-supports-run", "backend=te", ["backend=auto"]),
    (
        TINY,
        "cpu",
        2,
        ["layout.dispatcher=flex"],
        "cpu-supports-run",
        "flex",
        ["layout.dispatcher=alltoall"],
    ),
    (
        TINY,
        "cpu",
        2,
        ["checkpoint.async_save=true"],
        "async-save-on-gpu",
        "checkpoint.async_save=true",
        ["checkpoint.async_save=false"],
    ),
]


@pytest.mark.parametrize(("name", "device", "ranks", "bad", "rule", "named", "fix"), CASES)
def test_a_broken_rule_is_reported_and_its_fix_works(
    name: str, device: Device, ranks: int, bad: list[str], rule: str, named: str, fix: list[str]
) -> None:
    run = apply_overrides(recipe(name), bad)
    violations = check(run, ranks, device, machine=False)
    assert [violation.rule.name for violation in violations] == [rule] * len(violations)
    assert named in " ".join(violation.problem.value for violation in violations)
    assert all(violation.problem.fix and violation.rule.evidence for violation in violations)
    with pytest.raises(InputError, match=named.split("=")[0].split(" ")[0]):
        enforce(run, ranks, device, machine=False)
    if rule == "layout-fits" and ranks == 3:
        fix = [*fix, "schedule.batch_schedule=[[0,12]]", "schedule.train_samples=4644"]
    assert check(apply_overrides(run, fix), ranks, device, machine=False) == []


def test_every_rule_has_a_case_here() -> None:
    machine = {rule.name for rule in RULES if rule.machine}
    assert {case[4] for case in CASES} == {rule.name for rule in RULES} - machine
    assert machine == {"packages-present", "data-present", "resume-fits", "resume-keeps-optimizer"}
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.statement.endswith(".")
        assert rule.evidence


def test_enforce_reports_all_at_once() -> None:
    run = apply_overrides(
        recipe(BIG), ["layout.ep=6", "precision.fp8_param_gather=true", "data.sequence_length=9000"]
    )
    with pytest.raises(InputError) as error:
        enforce(run, 256, "cuda", machine=False)
    for key in ("layout.ep=6", "precision.fp8_param_gather=true", "data.sequence_length=9000"):
        assert key in str(error.value)
    assert "breaks 4 rules" in error.value.rule  # ep divides neither the experts nor the ranks
    enforce(recipe(BIG), 256, "cuda", machine=False)


def test_parameter_gather_is_forbidden_only_with_muon() -> None:
    adam = apply_overrides(recipe(BIG), ["precision.fp8_param_gather=true", "optimizer.name=adam"])
    assert check(adam, 256, "cuda", machine=False) == []


def broken_on_this_machine(run: Run, device: Device = "cpu") -> list[tuple[str, str]]:
    return [(violation.rule.name, violation.problem.value) for violation in check(run, 2, device)]


def with_data(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return the run; its data count as present."""
    monkeypatch.setattr("mellum2_megatron.data.feed.datasets.check_data", lambda run: None)
    return run


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    run = apply_overrides(recipe(TINY), [f"data.path={tmp_path / 'none'}"])
    assert broken_on_this_machine(run) == [("data-present", f"data.path={tmp_path / 'none'}")]
    assert check(run, 2, "cpu", machine=False) == []


def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_data(apply_overrides(recipe(TINY), ["logging.wandb_project=p"]), monkeypatch)
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None)
    assert broken_on_this_machine(run) == [("packages-present", "logging.wandb_project=p")]
    assert ("packages-present", "backend=auto, te on a GPU") in broken_on_this_machine(run, "cuda")
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: object())
    assert broken_on_this_machine(run) == []


@pytest.mark.parametrize(
    ("saved", "change", "named"),
    [
        (["optimizer.name=adam"], ["layout.ep=1"], "layout.ep=1"),
        (["optimizer.name=adam"], ["layout.ep=4"], None),
        (["optimizer.name=adam", "layout.ep=1"], ["layout.etp=2"], "layout.etp=2"),
        (["optimizer.name=adam", "layout.ep=1", "layout.etp=2"], ["layout.etp=1"], "layout.etp=1"),
        (
            ["optimizer.name=adam", "layout.ep=1", "layout.etp=2"],
            ["layout.etp=1", "layout.ep=2"],
            None,
        ),
        (
            ["optimizer.name=adam", "layout.ep=1", "layout.etp=2"],
            ["layout.tp=2", "layout.sp=true"],
            "layout.tp=2",
        ),
        ([], ["optimizer.name=adam"], "optimizer.name=adam"),
        ([], ["layout.ep=4"], None),
        ([], ["layout.ep=1"], None),
        (["layout.ep=1"], ["layout.etp=2"], None),
    ],
    ids=parameter_id,
)
def test_optimizer_state_must_be_readable_on_resume(
    saved: list[str],
    change: list[str],
    named: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = apply_overrides(recipe(TINY), ["schedule.micro_batch_size=2", *saved])
    before = with_data(
        dataclasses.replace(
            before, checkpoint=dataclasses.replace(before.checkpoint, output=str(tmp_path))
        ),
        monkeypatch,
    )
    (tmp_path / RUN_FILE).write_text(to_yaml(before))
    after = apply_overrides(before, change)
    assert check(after, 4, "cpu") == [], "nothing is there to resume yet"
    (tmp_path / TRACKER_FILE).write_text("100")
    assert check(before, 4, "cpu") == []
    found = [violation.problem.value for violation in check(after, 4, "cpu")]
    assert found == [] if named is None else (len(found) == 1 and named in found[0])
