"""Runs that are not those of the study as it is now are not compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ablations.answering.comparable import check_comparable
from ablations.answering.run_measures import RunMeasures, measure
from ablations.asking.study import Arm, DataSet
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_text
from mellum2_megatron.config import Run, apply_overrides, to_yaml
from tests.ablations.study_files import NAME, STUDY, base, plan_of, tasks, write_task

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunMeasures]:
    results = tmp_path_factory.mktemp("results")
    for arm in STUDY.arms:
        for seed in SEEDS:
            write_task(results, arm.name, seed)
    return [measure(task) for task in tasks(results)]


def changed(runs: list[RunMeasures], arm: str, seed: int, *words: str) -> list[RunMeasures]:
    return [
        dataclasses.replace(run, run=apply_overrides(run.run, words))
        if (run.arm, run.seed) == (arm, seed)
        else run
        for run in runs
    ]


def with_identity(runs: list[RunMeasures], arm: str, **identity: str) -> list[RunMeasures]:
    return [
        dataclasses.replace(
            run,
            task=dataclasses.replace(
                run.task,
                record=run.task.record.replace(identity=identity if run.arm == arm else {}),
            ),
        )
        for run in runs
    ]


def test_arms_and_seeds_may_differ(runs: list[RunMeasures]) -> None:
    check_comparable(plan_of(), runs)
    # A path, a name and a service change no number.
    words = ("name=other", "data.path=elsewhere", "logging.tensorboard=false", "data.workers=3")
    check_comparable(plan_of(), changed(runs, "with", 1, *words))


@pytest.mark.parametrize(
    ("arm", "seed", "word"),
    [
        ("with", 1, "loss.z_loss_coef=0.5"),
        ("flat", 2, "loss.z_loss_coef=0.5"),
        ("flat", 2, "schedule.micro_batch_size=2"),
        ("without", 2, "optimizer.lr=0.5"),
        ("with", 1, "seed=7"),
        ("with", 2, "data.seed=7"),
        ("with", 2, "architecture.num_experts_per_tok=1"),
        ("with", 2, "architecture.num_hidden_layers=8"),
    ],
)
def test_another_value_than_the_arms(
    runs: list[RunMeasures], arm: str, seed: int, word: str
) -> None:
    key = word.partition("=")[0].replace(".", r"\.")
    with pytest.raises(InputError, match=rf"{arm} seed {seed}: {key} is .* in its run"):
        check_comparable(plan_of(), changed(runs, arm, seed, word))


def changed_base() -> Run:
    return apply_overrides(base(), ["optimizer.lr=0.001"])


@pytest.mark.parametrize(
    "change",
    [
        {"common": {"tiny": ("optimizer.lr=0.001",)}},
        {"bases": {"tiny": changed_base}},
    ],
    ids=["common", "base"],
)
def test_a_change_that_reaches_all_runs_alike(
    runs: list[RunMeasures], change: dict[str, object]
) -> None:
    study = dataclasses.replace(STUDY, **change)  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"optimizer\.lr is 0\.002 in its run, 0\.001 in the study"
    ):
        check_comparable(plan_of(study), runs)


def test_an_arm_that_changed_since_its_runs(runs: list[RunMeasures]) -> None:
    arms = (*STUDY.arms[:2], Arm("flat", "loss.z_loss_coef=0.02"))
    with pytest.raises(InputError, match=r"flat seed 1: loss\.z_loss_coef is 0\.01 .*0\.02 in the"):
        check_comparable(plan_of(dataclasses.replace(STUDY, arms=arms)), runs)
    # An override taken back, which no key of the arm names any more.
    arms = (*STUDY.arms[:2], Arm("flat", "loss.aux_loss_coef=0.02"))
    with pytest.raises(InputError, match=r"flat seed 1: loss\.(z|aux)_loss_coef"):
        check_comparable(plan_of(dataclasses.replace(STUDY, arms=arms)), runs)


def test_layers_bring_their_types(runs: list[RunMeasures]) -> None:
    arms = (*STUDY.arms[1:], Arm("with", "architecture.num_hidden_layers=8"))
    plan = plan_of(dataclasses.replace(STUDY, arms=arms))
    with pytest.raises(InputError, match="num_hidden_layers"):
        check_comparable(plan, runs)
    deeper = changed(runs, "with", 1, "architecture.num_hidden_layers=8")
    check_comparable(plan, changed(deeper, "with", 2, "architecture.num_hidden_layers=8"))


def test_other_data(runs: list[RunMeasures]) -> None:
    other = with_identity(runs, "with", **{"data.train": "abc"})
    with pytest.raises(InputError, match=r"contents of data\.train"):
        check_comparable(plan_of(), other)
    data = DataSet(name="other", path="data/other", command="make {path}")
    arms = (*STUDY.arms[1:], Arm("with", data=data))
    check_comparable(plan_of(dataclasses.replace(STUDY, arms=arms)), other)


def test_another_start(tmp_path: Path) -> None:
    write_task(tmp_path, "with", 1)
    runs = [measure(task) for task in tasks(tmp_path)]
    plan = plan_of(dataclasses.replace(STUDY, starts_from={"tiny": base}))
    assert plan.start is not None
    check_comparable(plan, runs)
    started = apply_overrides(plan.start, ["seed=1"])
    file = tmp_path / NAME / "tiny" / "_start" / "seed_1" / "run.yaml"
    file.parent.mkdir(parents=True)
    write_text(file, to_yaml(started))
    check_comparable(plan, runs)
    write_text(file, to_yaml(apply_overrides(started, ["optimizer.lr=0.5"])))
    with pytest.raises(InputError, match=r"_start seed 1: optimizer\.lr is 0\.5 in its run"):
        check_comparable(plan, runs)
