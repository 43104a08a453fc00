"""Runs that differ in more than the keys of their arms are not compared."""

from __future__ import annotations

import dataclasses

import pytest

from ablations.answering.comparable import check_comparable
from ablations.answering.run_measures import RunMeasures, measure
from ablations.asking.deciding import deciding_values
from ablations.asking.finding import find_study, shipped
from ablations.asking.planned import plan_study, scales_of
from ablations.asking.study import Arm, DataSet
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import apply_overrides
from tests.ablations.study_files import STUDY, tasks, write_task

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
    check_comparable(STUDY, "tiny", runs)
    # A path, a name and a service change no number.
    words = ("name=other", "data.path=elsewhere", "logging.tensorboard=false", "data.workers=3")
    check_comparable(STUDY, "tiny", changed(runs, "with", 1, *words))


@pytest.mark.parametrize(
    ("arm", "seed", "word"),
    [
        ("with", 1, "loss.z_loss_coef=0.5"),
        ("flat", 2, "schedule.micro_batch_size=2"),
        ("without", 2, "optimizer.lr=0.5"),
        ("with", 1, "seed=7"),
        ("with", 2, "architecture.num_experts_per_tok=1"),
    ],
    ids=["loss", "batch", "control", "seed", "model"],
)
def test_another_key(runs: list[RunMeasures], arm: str, seed: int, word: str) -> None:
    with pytest.raises(InputError, match=word.partition("=")[0].replace(".", r"\.")):
        check_comparable(STUDY, "tiny", changed(runs, arm, seed, word))


def test_control_that_lacks_a_seed(runs: list[RunMeasures]) -> None:
    kept = [run for run in runs if (run.arm, run.seed) != ("without", 2)]
    check_comparable(STUDY, "tiny", kept)
    with pytest.raises(InputError, match=r"with seed 2 against without seed 1: optimizer\.lr"):
        check_comparable(STUDY, "tiny", changed(kept, "with", 2, "optimizer.lr=0.5"))


def test_layers_bring_their_types(runs: list[RunMeasures]) -> None:
    arms = (*STUDY.arms[1:], Arm("with", "architecture.num_hidden_layers=8"))
    study = dataclasses.replace(STUDY, arms=arms)
    deeper = changed(runs, "with", 1, "architecture.num_hidden_layers=8")
    deeper = changed(deeper, "with", 2, "architecture.num_hidden_layers=8")
    check_comparable(study, "tiny", deeper)
    with pytest.raises(InputError, match="num_hidden_layers"):
        check_comparable(STUDY, "tiny", deeper)


def test_other_data(runs: list[RunMeasures]) -> None:
    other = with_identity(runs, "with", **{"data.train": "abc"})
    with pytest.raises(InputError, match=r"identity: data\.train"):
        check_comparable(STUDY, "tiny", other)
    data = DataSet(name="other", path="data/other", command="make {path}")
    arms = (*STUDY.arms[1:], Arm("with", data=data))
    check_comparable(dataclasses.replace(STUDY, arms=arms), "tiny", other)


def test_a_study_that_changed_since_its_runs(runs: list[RunMeasures]) -> None:
    arms = (*STUDY.arms[:2], Arm("flat", "loss.z_loss_coef=0.02"))
    with pytest.raises(InputError, match=r"flat seed 1: loss\.z_loss_coef is 0\.01 .*0\.02 in the"):
        check_comparable(dataclasses.replace(STUDY, arms=arms), "tiny", runs)
    control = Arm("without", "architecture.num_mtp_layers=0 loss.z_loss_coef=0.5")
    arms = (STUDY.arms[0], control, STUDY.arms[2])
    with pytest.raises(InputError, match=r"without seed 1: loss\.z_loss_coef"):
        check_comparable(dataclasses.replace(STUDY, arms=arms), "tiny", runs)


@pytest.mark.parametrize("name", shipped())
def test_a_run_as_planned_has_the_values_of_its_arm(name: str) -> None:
    """Otherwise a report would refuse the study's own runs."""
    named = find_study(name)
    for scale in scales_of(named.study):
        for planned in plan_study(named, scale).arms:
            again = apply_overrides(planned.run, planned.arm.words(scale))
            assert deciding_values(again) == deciding_values(planned.run)
