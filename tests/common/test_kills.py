"""Atomic files and folders, killed at every call that changes the disk."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mellum2_megatron.common import files
from mellum2_megatron.common.files import (
    atomic_directory,
    atomic_path,
    move_into_place,
    remove_directory,
    write_text,
)
from mellum2_megatron.common.staging import exchange, remove_leftovers, staging
from tests.kills import contents, forked, survives_kills

OLD = {"result/old": b"old", "result": None}
NEW = {"result/first": b"1" * 100_000, "result/in": None, "result/in/second": b"2", "result": None}


def old_folder(folder: Path) -> None:
    (folder / "result").mkdir()
    (folder / "result" / "old").write_text("old")


def fill(folder: Path) -> None:
    (folder / "first").write_bytes(b"1" * 100_000)
    (folder / "in").mkdir()
    (folder / "in" / "second").write_bytes(b"2")


def named(folder: Path) -> dict[str, bytes | None]:
    """Return what is in a folder without the names of unfinished work."""
    return {name: data for name, data in contents(folder).items() if not name.startswith(".")}


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        assert (folder / "file").read_text() in ("old", "new" * 10_000)

    kills = survives_kills(
        lambda folder: write_text(folder / "file", "new" * 10_000),
        tmp_path,
        start=lambda folder: (folder / "file").write_text("old"),
        check=check,
    )
    assert kills >= 5


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_the_old_or_the_new_one(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:  # as on NFS and Lustre
        monkeypatch.setattr(files, "exchange", lambda first, second: False)

    def work(folder: Path) -> None:
        with atomic_directory(folder / "result", overwrite=True) as new:
            fill(new)

    def check(folder: Path) -> None:
        if not can_exchange:
            remove_leftovers(folder)  # as the next start for any target beside it does
        assert named(folder) in (OLD, NEW)

    assert survives_kills(work, tmp_path, start=old_folder, check=check) > 10


def test_a_new_folder_appears_complete(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        with atomic_directory(folder / "result") as new:
            fill(new)

    def check(folder: Path) -> None:
        assert named(folder) in ({}, NEW)

    def again(folder: Path) -> None:
        try:
            work(folder)
        except FileExistsError:
            assert named(folder) == NEW

    survives_kills(work, tmp_path, check=check, again=again)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_moves_into_place_or_stays(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "exchange", lambda first, second: False)

    def start(folder: Path) -> None:
        old_folder(folder)
        make(folder)

    def make(folder: Path) -> None:
        (folder / ".work").mkdir(exist_ok=True)
        if not (folder / ".work" / "first").exists():
            fill(folder / ".work")

    def check(folder: Path) -> None:
        remove_leftovers(folder)
        assert named(folder) in (OLD, NEW)
        # Never the old result under the name of the new one's source.
        assert not (folder / ".work" / "old").exists()

    def again(folder: Path) -> None:
        make(folder)
        move_into_place(folder / ".work", folder / "result")

    survives_kills(
        lambda folder: move_into_place(folder / ".work", folder / "result"),
        tmp_path,
        start=start,
        check=check,
        again=again,
    )


def test_a_folder_is_removed_whole_and_by_any_later_call(tmp_path: Path) -> None:
    def start(folder: Path) -> None:
        old_folder(folder)
        (folder / "beside").mkdir()
        (folder / ".config.old").mkdir()  # not ours
        (folder / ".config.old" / "kept").write_text("kept")

    def check(folder: Path) -> None:
        assert {name for name in named(folder) if name.startswith("result")} in (set(OLD), set())

    def again(folder: Path) -> None:
        if (folder / "result").exists():
            remove_directory(folder / "result")
        (folder / "other").mkdir()
        remove_directory(folder / "other")

    survives_kills(
        lambda folder: remove_directory(folder / "result"),
        tmp_path,
        start=start,
        check=check,
        again=again,
    )


def hold(target: Path, ready: Callable[[], object], wait: Callable[[], object]) -> None:
    with staging(target) as stage, atomic_path(target.with_name("file")) as file:
        (stage / "half").write_text("half")
        file.write_text("half")
        ready()
        wait()
        assert (stage / "half").exists()
        assert file.exists()
    assert target.with_name("file").read_text() == "half"


def test_what_a_live_process_uses_stays(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    process = context.Process(
        target=hold, args=(tmp_path / "result", ready.set, lambda: go.wait(60))
    )
    process.start()
    try:
        assert ready.wait(60)
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.glob(".*.partial"))) == 2
    finally:
        go.set()
        process.join()
    assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_leftovers_of_one_target_only(tmp_path: Path) -> None:
    def work() -> None:
        with staging(tmp_path / "a"), staging(tmp_path / "a.b"), staging(tmp_path / "[x]"):
            os._exit(9)

    assert forked(work) == 9
    user = tmp_path / ".a.partial"
    user.mkdir()
    (user / "journal.jsonl").write_text("")
    remove_leftovers(tmp_path, "a")
    assert {path.name.split(".new-")[0] for path in tmp_path.iterdir()} == {
        ".a.b",
        ".[x]",
        user.name,
    }
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [user]


def test_a_disk_without_locks_keeps_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    write_text(tmp_path / "file", "text")
    with staging(tmp_path / "result") as stage:
        remove_leftovers(tmp_path)
        assert stage.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_folders_are_exchanged(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


def test_a_result_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def work() -> None:
        with atomic_directory(tmp_path / "result") as folder:
            fill(folder)
            old_folder(tmp_path)

    with pytest.raises(OSError, match="not empty"):
        work()
    assert contents(tmp_path) == OLD
