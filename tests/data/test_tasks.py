"""Tasks: named by what decides their content; killed anywhere, the same bytes at the end."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.data.pipeline.tasks import Task, remove_leftovers, run_stage, run_task


def write(task: Task, results: Path, folder: Path) -> dict[str, Any]:
    """Write the settings' text and what the inputs wrote."""
    earlier = [one.folder(results) / "text" for one in task.inputs]
    text = "".join(path.read_text() for path in earlier) + task.settings["text"]
    (folder / "text").write_text(text)
    return {"length": len(text)}


def fail(task: Task, results: Path, folder: Path) -> dict[str, Any]:
    (folder / "text").write_text("half")
    raise InputError("x", rule="fails", fix="none")


def full(task: Task, results: Path, folder: Path) -> dict[str, Any]:
    (folder / "text").write_text("half")
    raise OSError(28, "No space left on device")


def die(task: Task, results: Path, folder: Path) -> dict[str, Any]:
    (folder / "text").write_text("half")
    os._exit(9)


def make(label: str, *inputs: Task, text: str = "a", work: Any = write, version: int = 1) -> Task:
    return Task(
        stage="one" if not inputs else "two",
        label=label,
        version=version,
        work=work,
        settings={"text": text},
        inputs=inputs,
    )


def test_names_follow_everything_that_decides() -> None:
    base = make("x", make("y"))
    assert base.name == make("x", make("y")).name
    assert base.name.startswith("two/x-")
    others = [
        make("x", make("y", text="b")),
        make("x", make("y", version=2)),
        make("x", make("y"), text="b"),
        make("x", make("y"), make("z")),
        make("x", make("y"), version=2),
    ]
    assert len({base.name, *(one.name for one in others)}) == 6


def test_inputs_must_have_their_full_length(tmp_path: Path) -> None:
    first = make("x", text="abcd")
    run_task(first, tmp_path)
    (first.folder(tmp_path) / "text").write_text("ab")
    with pytest.raises(InputError, match=r"text: it should have 4 bytes and has 2\. Fix: remove"):
        run_task(make("y", first), tmp_path)
    (first.folder(tmp_path) / "text").unlink()
    with pytest.raises(InputError, match="and is missing"):
        run_task(make("z", first), tmp_path)


def test_a_result_is_made_once_and_complete(tmp_path: Path) -> None:
    first = make("x")
    second = make("y", first, text="b")
    with pytest.raises(InputError, match="run stage one first"):
        run_task(second, tmp_path)
    assert run_task(first, tmp_path)
    assert not run_task(first, tmp_path)
    assert run_task(second, tmp_path)
    manifest = second.manifest(tmp_path)
    assert manifest["length"] == 2
    assert manifest["inputs"] == [first.name]
    assert manifest["files"]["text"]["bytes"] == 2


@pytest.mark.parametrize(("work", "error"), [(fail, InputError), (full, WorkError)])
def test_failures_leave_nothing(tmp_path: Path, work: Any, error: type[Exception]) -> None:
    task = make("x", work=work)
    with pytest.raises(error):
        run_task(task, tmp_path)
    assert not list(tmp_path.rglob("text"))
    assert not task.done(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_one_failure_does_not_keep_others_from_ending(tmp_path: Path, workers: int) -> None:
    tasks = [make("a"), make("b", work=fail), make("c", text="c"), make("d", text="d")]
    with pytest.raises(InputError, match="fails"):
        list(run_stage(tasks, tmp_path, workers=workers))
    assert [task.done(tmp_path) for task in tasks] == [True, False, True, True]
    # The next run does what is missing.
    mended = [*tasks[:1], make("b", text="b"), *tasks[2:]]
    ran = {task.label: ran for task, ran in run_stage(mended, tmp_path, workers=workers)}
    assert ran == {"a": False, "b": True, "c": False, "d": False}


def test_killed_worker_is_named_and_its_folder_removed(tmp_path: Path) -> None:
    tasks = [make("a", work=die), make("b", work=die)]
    with pytest.raises(WorkError, match="a worker was killed"):
        list(run_stage(tasks, tmp_path, workers=2))
    assert list((tmp_path / "one").glob(".*.partial"))
    remove_leftovers(tmp_path, tasks)
    assert not list((tmp_path / "one").iterdir())


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """Also when its task has another name by now, after a changed setting."""
    with pytest.raises(WorkError):
        list(run_stage([make("a", work=die), make("b", work=die)], tmp_path, workers=2))
    changed = make("a", text="changed")
    list(run_stage([changed], tmp_path, workers=1))
    assert [path.name for path in (tmp_path / "one").iterdir()] == [changed.name.partition("/")[2]]


def test_a_task_takes_the_names_of_its_inputs_along_and_no_more() -> None:
    first = make("x")
    second = make("y", first.result, text="b")
    assert second.name == make("y", first, text="b").name
    sent = pickle.loads(pickle.dumps(second))
    assert sent.inputs == (first.result,)
    assert not hasattr(sent.inputs[0], "work")


def test_damaged_manifest_is_refused(tmp_path: Path) -> None:
    task = make("x")
    run_task(task, tmp_path)
    (task.folder(tmp_path) / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="run the plan again"):
        task.manifest(tmp_path)
