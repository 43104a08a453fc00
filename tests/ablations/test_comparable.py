"""Runs that differ in more than the keys of their arms are not compared."""

from __future__ import annotations

import dataclasses

import pytest

from ablations.answering.comparable import check_comparable
from ablations.answering.run_measures import RunMeasures, measure
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
