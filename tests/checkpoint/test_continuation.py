"""One training in several runs: each continues the former's state, on data of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mellum2_megatron.checkpoint import StartingPoint, check_run_folder
from mellum2_megatron.checkpoint.folder import (
    LAST_FILE,
    iteration_folder_name,
    write_architecture,
    write_tracker,
)
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run, apply_overrides, to_yaml
from mellum2_megatron.data.feed.continued_training import ContinuedTraining
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.planning.rules import check
from mellum2_megatron.recipes import recipe
from tests import parameter_id
from tests.training.test_train import losses, small_run, train, weights

FIRST = ["schedule.train_samples=16", "schedule.horizon_samples=40"]
"""Three of the six steps of `small_run`."""


@pytest.fixture(scope="module")
def first_phase(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        small_run(small_data, tmp_path_factory.mktemp("phases") / "first", *FIRST), nproc=2
    )


@pytest.mark.distributed
def test_two_runs_equal_one_training(
    trained: Path,
    first_phase: Path,
    small_data: PreparedData,
    tmp_path: Path,
) -> None:
    """Same steps, rates, losses and weights as an uninterrupted run, to the bit."""
    second = train(
        small_run(small_data, tmp_path / "second", f"checkpoint.continue_from={first_phase}"),
        nproc=2,
    )
    for name in ("learning_rate", "lm_loss", "mtp_loss", "aux_loss", "grad_norm", "samples"):
        whole = losses(trained, name)
        assert losses(first_phase, name) | losses(second, name) == whole, name
        assert list(losses(second, name)) == [4, 5, 6], name
    expected, found = weights(trained), weights(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.distributed
def test_a_phase_starts_its_own_data(
    first_phase: Path, small_data: PreparedData, tmp_path: Path
) -> None:
    """The first step has the loss of a fresh run with these weights and data; then it resumes."""
    own = [
        "data.first_sample=16",
        f"checkpoint.continue_from={first_phase}",
        "checkpoint.save_interval=1",
    ]
    phase = train(
        small_run(small_data, tmp_path / "phase", "schedule.train_samples=24", *own), nproc=2
    )
    fresh = [
        "schedule.batch_schedule=[[0,8]]",
        "schedule.train_samples=8",
        "schedule.warmup_samples=0",
    ]
    fresh += [
        "schedule.decay_samples=0",
        f"checkpoint.load={first_phase}",
        "logging.eval_iterations=0",
    ]
    alone = train(small_run(small_data, tmp_path / "fresh", *fresh), nproc=2)
    assert losses(phase)[4] == losses(alone)[1]
    # Started again, it resumes its own folder: one more step; the one that was saved is not
    # repeated.
    saved = phase / iteration_folder_name(4) / LAST_FILE
    written = saved.stat().st_mtime_ns
    train(small_run(small_data, phase, "schedule.train_samples=32", *own), nproc=2)
    assert saved.stat().st_mtime_ns == written
    assert list(losses(phase)) == [4, 5]
    assert losses(phase, "samples") == {4: 24, 5: 32}


def test_samples_before_the_first_are_never_read() -> None:
    inside = SimpleNamespace(index_split="train", __len__=None)
    tokens = [{"tokens": torch.tensor([number])} for number in range(5)]

    class Samples(list[dict[str, torch.Tensor]]):
        index_split = inside.index_split

    dataset = ContinuedTraining(Samples(tokens), first=100)  # type: ignore[arg-type]
    assert len(dataset) == 105
    assert dataset.index_split == "train"
    assert [int(dataset[index]["tokens"]) for index in (100, 104)] == [0, 4]
    with pytest.raises(IndexError, match="the data begin at 100"):
        dataset[99]


# -- State that does not fit


def folder_of(run: Run, root: Path, *, step: int | None) -> Path:
    """Write the files of a run at a step, as far as checks read them; None: a release."""
    root.mkdir(parents=True)
    folder = root / ("release" if step is None else iteration_folder_name(step))
    folder.mkdir()
    (folder / LAST_FILE).write_text("{}")
    (root / "run.yaml").write_text(to_yaml(run))
    write_architecture(root, run.architecture)
    write_tracker(root, step)
    return root


def tiny(*overrides: str) -> Run:
    return apply_overrides(recipe("mellum2_tiny_pretrain"), overrides)


def check_folder(run: Run) -> None:
    check_run_folder(run, StartingPoint.of(run))


def continued(root: Path, output: Path, *overrides: str) -> Run:
    return tiny(f"checkpoint.continue_from={root}", f"checkpoint.output={output}", *overrides)


@pytest.mark.parametrize(
    ("step", "overrides", "message"),
    [
        (
            100,
            ["data.first_sample=1600"],
            r"has reached sample 1440 \(step 100\) only.*schedule\.train_samples=4640",
        ),
        (300, ["data.first_sample=4641", "schedule.train_samples=4656"], "data.first_sample=4640"),
        (
            100,
            ["schedule.batch_schedule=[[0,16]]", "schedule.train_samples=4800"],
            r"step 100 there is sample 1440, here 1600",
        ),
        (100, ["architecture.num_experts=4"], "num_experts: 8 there, 4 here"),
        (None, [], "holds weights without a run's state.*checkpoint.load"),
        (100, [], None),
        (100, ["data.first_sample=1440"], None),
    ],
    ids=parameter_id,
)
def test_the_state_must_fit(
    tmp_path: Path, step: int | None, overrides: list[str], message: str | None
) -> None:
    root = folder_of(tiny(), tmp_path / "before", step=step)
    run = continued(root, tmp_path / "new", *overrides)
    if message is None:
        check_folder(run)
    else:
        with pytest.raises(InputError, match=message):
            check_folder(run)


def test_an_iteration_inside_a_folder_is_refused(tmp_path: Path) -> None:
    root = folder_of(tiny(), tmp_path / "before", step=100)
    with pytest.raises(
        InputError, match=f"checkpoint.continue_from={root}$|continue_from={root}\\."
    ):
        check_folder(continued(root / iteration_folder_name(100), tmp_path / "new"))


def test_later_phase_needs_the_former_run(tmp_path: Path) -> None:
    run = tiny(f"checkpoint.output={tmp_path / 'new'}", "data.first_sample=16")
    with pytest.raises(InputError, match=r"data.first_sample=16 in a run that starts at sample 0"):
        check_folder(run)
    with pytest.raises(InputError, match=r"the run ends at schedule.train_samples=4640"):
        tiny("data.first_sample=4640")
    # With a checkpoint of its own the run does not need the former any more.
    folder_of(run, tmp_path / "own", step=10)
    check_folder(tiny(f"checkpoint.output={tmp_path / 'own'}", "data.first_sample=16"))


@pytest.mark.parametrize("where", ["checkpoint.continue_from", "checkpoint.output"])
@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("optimizer.lr=0.001", "optimizer.lr=0.002"),
        ("optimizer.min_lr=1e-05", "optimizer.min_lr=0.0"),
        ("optimizer.muon_router=False", "optimizer.muon_router=True"),
        ("optimizer.muon_momentum=0.9", "optimizer.muon_momentum=0.95"),
        ("optimizer.adam_beta2=0.99", "optimizer.adam_beta2=0.95"),
        ("optimizer.weight_decay=0.2", None),
        ("optimizer.muon_split_gate_up=True", None),
    ],
)
def test_settings_stored_in_the_checkpoint_cannot_change(
    tmp_path: Path, where: str, change: str, kept: str | None
) -> None:
    """Without the rule rates raise ValueError, `muon_router` KeyError; momentum silently stays."""
    root = folder_of(tiny(), tmp_path / "before", step=100)
    places = {"checkpoint.output": str(tmp_path / "new")} | {where: str(root)}
    run = tiny(*(f"{key}={value}" for key, value in places.items()), change.lower())
    values = [
        violation.problem.value
        for violation in check(run, 2, "cpu")
        if violation.rule.name == "resume-keeps-settings"
    ]
    assert values == ([f"{change} with a checkpoint of {kept} in {root}"] if kept else [])
