"""The starting point of a run: every kind, what overrides what, and folders that cannot be used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mellum2_megatron.checkpoint import StartingPoint, find_checkpoint
from mellum2_megatron.checkpoint.folder import (
    LAST_FILE,
    RUN_FILE,
    TRACKER_FILE,
    iteration_folder_name,
    write_tracker,
)
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import to_yaml
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.planning.resume import is_done
from mellum2_megatron.planning.rules import check
from mellum2_megatron.upstream import megatron_arguments
from tests.checkpoint.test_continuation import check_folder, folder_of, tiny
from tests.distributed import run_distributed
from tests.training.test_train import small_run

STEP = 12_000
NOTHING_LEFT = "nothing is left to train: all 40 samples are done"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "own"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return folder_of(tiny("seed=7"), tmp_path / "other", step=STEP)


def of(*overrides: str) -> StartingPoint:
    return StartingPoint.of(tiny(*overrides))


# -- Kinds


def test_nothing_named_is_a_new_run(own: Path) -> None:
    new = StartingPoint(kind="new")
    assert of() == new  # no output folder either
    assert of(f"checkpoint.output={own}") == new
    own.mkdir()
    assert of(f"checkpoint.output={own}") == new
    (own / RUN_FILE).write_text(to_yaml(tiny()))  # of a run that has not saved yet
    (own / iteration_folder_name(5)).mkdir()
    assert of(f"checkpoint.output={own}") == new
    assert (new.has_state, new.names_iteration, new.step) == (False, False, None)
    line = new.line(tiny(f"checkpoint.output={own}"))
    assert line == f"mellum2_tiny_pretrain starts anew in {own}"


@pytest.mark.parametrize(
    "origin", [None, "load", "continue_from"], ids=lambda origin: origin or "none"
)
def test_a_run_resumes_its_own_checkpoint(own: Path, other: Path, origin: str | None) -> None:
    """Other folders are named for the first start only."""
    saved = tiny("seed=3")
    folder_of(saved, own, step=STEP)
    named = [] if origin is None else [f"checkpoint.{origin}={other}"]
    start = of(f"checkpoint.output={own}", *named)
    assert start == StartingPoint(
        kind="resume", folder=own, checkpoint=find_checkpoint(own), before=saved
    )
    assert (start.has_state, start.names_iteration, start.step) == (True, False, STEP)
    assert start.line(tiny()) == f"mellum2_tiny_pretrain resumes step 12,000 of {own}"


def test_the_tracker_decides_not_the_newest_folder(own: Path) -> None:
    folder_of(tiny(), own, step=2)
    (own / iteration_folder_name(3)).mkdir()  # a save that was killed, before the tracker moved
    assert of(f"checkpoint.output={own}").step == 2


def test_a_run_continues_another(own: Path, other: Path) -> None:
    start = of(f"checkpoint.output={own}", f"checkpoint.continue_from={other}")
    assert start == StartingPoint(
        kind="continue", folder=other, checkpoint=find_checkpoint(other), before=tiny("seed=7")
    )
    assert (start.has_state, start.names_iteration, start.step) == (True, False, STEP)
    line = f"mellum2_tiny_pretrain continues {other} after step 12,000"
    assert start.line(tiny()) == line


def test_a_run_takes_weights(own: Path, other: Path) -> None:
    start = of(f"checkpoint.output={own}", f"checkpoint.load={other}")
    assert start == StartingPoint(
        kind="weights", folder=other, checkpoint=find_checkpoint(other), before=tiny("seed=7")
    )
    assert (start.has_state, start.names_iteration, start.step) == (False, False, None)
    folder = other / iteration_folder_name(STEP)
    assert start.line(tiny()) == f"mellum2_tiny_pretrain takes the weights of {folder}"


def test_state_takes_precedence_over_weights(other: Path, tmp_path: Path) -> None:
    """Both together are refused by a rule; until then the state counts."""
    start = of(f"checkpoint.load={tmp_path}", f"checkpoint.continue_from={other}")
    assert (start.kind, start.folder) == ("continue", other)


# -- Folders


@pytest.mark.parametrize("key", ["load", "continue_from"])
def test_one_checkpoint_inside_a_folder(other: Path, key: str) -> None:
    folder = other / iteration_folder_name(STEP)
    start = of(f"checkpoint.{key}={folder}")
    assert start.checkpoint == find_checkpoint(folder)
    assert start.names_iteration
    assert start.before == tiny("seed=7")


def test_paths_may_be_relative(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(other.parent)
    start = of(f"checkpoint.continue_from=./{other.name}/")
    assert start.folder == Path("other")
    assert start.checkpoint == find_checkpoint(other)
    assert not start.names_iteration
    assert start.line(tiny()).endswith("continues other after step 12,000")


@pytest.mark.parametrize("where", ["output", "load", "continue_from"])
def test_a_release_has_weights_only(tmp_path: Path, where: str) -> None:
    root = folder_of(tiny(), tmp_path / "imported", step=None)
    (root / RUN_FILE).unlink()
    for folder in {root, root / "release"} if where == "load" else {root}:
        start = of(f"checkpoint.{where}={folder}")
        assert start.checkpoint is not None
        assert (start.checkpoint.iteration, start.before, start.step) == (None, None, None)
        assert start.line(tiny()) == f"mellum2_tiny_pretrain takes the weights of {root}/release"


def test_a_run_without_run_yaml(own: Path) -> None:
    (folder_of(tiny(), own, step=STEP) / RUN_FILE).unlink()
    start = of(f"checkpoint.output={own}")
    assert (start.kind, start.step) == ("resume", STEP)
    assert (start.before, start.before_error) == (None, None)


@pytest.mark.parametrize("where", ["output", "load", "continue_from"])
def test_a_broken_run_yaml_is_kept_for_those_who_need_it(tmp_path: Path, where: str) -> None:
    root = folder_of(tiny(), tmp_path / "broken", step=STEP)
    (root / RUN_FILE).write_text("name: [")
    run = tiny(f"checkpoint.{where}={root}")
    start = StartingPoint.of(run)
    assert start.checkpoint == find_checkpoint(root)
    assert start.before is None
    assert isinstance(start.before_error, InputError)
    assert str(root / RUN_FILE) in start.before_error.value
    found = [entry for entry in check(run, 2, "cpu") if entry.rule.name == "resume-fits"]
    told = [entry.problem.value for entry in found]
    assert told == ([] if where == "load" else [start.before_error.value])


BROKEN = {
    "no folder": "there is no such folder",
    "empty": "neither config.json .* nor latest_checkpointed_iteration.txt",
    "unreadable tracker": "no readable latest_checkpointed_iteration.txt",
    "nonsense in the tracker": "holds 'soon'",
    "gone": "iter_0000013 is missing",
    "half": "iter_0012000 is half a checkpoint",
    "no architecture": "architecture.json is missing",
}


@pytest.mark.parametrize("where", ["output", "load", "continue_from"])
@pytest.mark.parametrize("case", BROKEN)
def test_an_unusable_folder_is_an_error_that_a_check_raises(
    case: str, where: str, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    if case == "empty":
        root.mkdir()
    elif case != "no folder":
        folder_of(tiny(), root, step=STEP)
    if case == "unreadable tracker":
        (root / TRACKER_FILE).write_bytes(b"\xff")
    elif case == "nonsense in the tracker":
        (root / TRACKER_FILE).write_text("soon")
    elif case == "gone":
        write_tracker(root, 13)
    elif case == "half":
        (root / iteration_folder_name(STEP) / LAST_FILE).unlink()
    elif case == "no architecture":
        (root / "architecture.json").unlink()

    output = "" if where == "output" else f"checkpoint.output={tmp_path / 'new'}"
    run = tiny(*filter(None, [output, f"checkpoint.{where}={root}"]))
    start = StartingPoint.of(run)
    if where == "output" and case in ("no folder", "empty"):
        assert start.kind == "new"  # nothing was saved there yet
        return
    assert start.checkpoint is None
    assert start.step is None
    with pytest.raises(InputError, match=BROKEN[case]):
        start.require_checkpoint()
    told = BROKEN[case]
    if where == "output" and case == "no architecture":
        told = "holds checkpoints without architecture.json"
    with pytest.raises(InputError, match=told):
        check_folder(run)
    # Settings are compared all the same where a run has saved something.
    tracker = case not in ("no folder", "empty")
    assert (start.before is not None) is tracker


def test_an_unfinished_checkpoint_inside_a_folder(other: Path) -> None:
    half = other / iteration_folder_name(13_000)
    half.mkdir()
    start = of(f"checkpoint.load={half}")
    assert (start.checkpoint, start.before) == (None, None)
    with pytest.raises(InputError, match=r"half a checkpoint.*complete: iter_0012000"):
        start.require_checkpoint()
    assert of(f"checkpoint.load={other}").checkpoint == find_checkpoint(other)


def test_unreadable_tracker_is_an_error(other: Path) -> None:
    (other / TRACKER_FILE).unlink()
    (other / TRACKER_FILE).mkdir()
    with pytest.raises(InputError, match="no readable"):
        of(f"checkpoint.load={other}").require_checkpoint()


# -- Megatron's arguments


def test_arguments_follow_the_starting_point(own: Path, other: Path) -> None:
    def loads(*overrides: str) -> dict[str, str]:
        run = tiny(f"checkpoint.output={own}", *overrides)
        start = StartingPoint.of(run)
        words = megatron_arguments(run, world_size=2, device="cpu", start=start)
        assert words == megatron_arguments(run, world_size=2, device="cpu")
        flags = ("--save", "--load", "--pretrained-checkpoint")
        return {word: words[words.index(word) + 1] for word in words if word in flags}

    here = {"--save": str(own), "--load": str(own)}
    assert loads() == here
    assert loads(f"checkpoint.continue_from={other}") == {**here, "--load": str(other)}
    weights = {**here, "--pretrained-checkpoint": str(other)}
    assert loads(f"checkpoint.load={other}") == weights
    folder_of(tiny(), own, step=2)
    assert loads(f"checkpoint.continue_from={other}") == here
    assert loads(f"checkpoint.load={other}") == here  # those weights may be gone by now


# -- The line


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("origin", "line"),
    [
        ("", "starts anew in {output}"),
        ("output", f"resumes step 6 of {{output}}\n{NOTHING_LEFT}"),
        ("continue_from", "continues {trained} after step 6"),
        ("load", "takes the weights of {trained}/iter_0000006"),
    ],
    ids=["new", "resume", "continue", "weights"],
)
def test_the_first_rank_states_the_start_once(
    origin: str, line: str, trained: Path, small_data: PreparedData, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    if origin == "output":
        shutil.copytree(trained, output)
    named = [f"checkpoint.{origin}={trained}"] if origin in ("continue_from", "load") else []
    if origin == "continue_from":
        named += ["schedule.train_samples=48"]
    file = tmp_path / "requested.yaml"
    file.write_text(to_yaml(small_run(small_data, output, *named)))
    outputs = run_distributed("tests.training.train_worker:announce", 2, str(file))
    expected = line.format(output=output, trained=trained)
    assert outputs == [f"mellum2_tiny_pretrain {expected}\n", ""]


def test_a_run_that_continues_a_longer_one_is_refused(trained: Path, small_data: PreparedData):
    """Its own folder would end without a checkpoint."""
    run = small_run(small_data, trained / "none", f"checkpoint.continue_from={trained}")
    with pytest.raises(InputError, match=r"train_samples=40: .* has seen 40 samples"):
        is_done(run, StartingPoint.of(run))
    longer = small_run(small_data, trained, "schedule.train_samples=48")
    assert not is_done(longer, StartingPoint.of(longer))
