"""Tasks on this machine: what is run, shared, refused and reported, with a stand-in training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ablations.asking.finding import find_study
from ablations.asking.planned import Plan, plan_study
from ablations.running.pool import Pool, Slots
from ablations.running.results import START, read_task, task_folder, tasks_on_disk
from ablations.running.tasks import Task, examine, tasks_of, try_lock
from launchers.early_end import ENDED_FILE, LossLimit, read_limit
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Device
from mellum2_megatron.data.prepared_folder import PreparedData
from tests.ablations.small_study import write_study

STEPS = 3

# Writes what a finished training leaves: a line in its log, metrics, the tracker of its last step.
STAND_IN = """
import json, os, pathlib, signal, sys, time
folder, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2]
print("thread count", os.environ["OMP_NUM_THREADS"], flush=True)
with (folder / "starts").open("a") as file: file.write("x")
for step in (1, 2, 3):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": step, "lm_loss": 9.0}) + chr(10))
if behaviour == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
if behaviour == "fail":
    sys.exit("error: the disk is full. Fix: free space.")
(folder / "latest_checkpointed_iteration.txt").write_text("3")
"""


def plan_of(file: Path) -> Plan:
    return plan_study(find_study(str(file)), "tiny")


def run_all(
    plan: Plan,
    results: Path,
    *,
    seeds: int = 2,
    behaviour: dict[str, str] | None = None,
    places: int = 2,
):
    """Run a plan's tasks with the stand-in; ``behaviour`` gives arms another one."""

    def command(task: Task, device: Device) -> list[str]:
        kind = (behaviour or {}).get(task.record.arm, "work")
        return [sys.executable, "-S", "-c", STAND_IN, str(task.folder), kind]

    tasks = tasks_of(plan, results, range(1, seeds + 1))
    pool = Pool(
        results=results,
        slots=Slots(tasks=places, ranks=1, threads=1),
        device="cpu",
        command=command,
    )
    return pool.run(examine(tasks, results))


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


@pytest.fixture
def file(small_data: PreparedData, tmp_path: Path) -> Path:
    return write_study(tmp_path / "mine.py", small_data)


def test_tasks_are_run_once_and_seeds_added_later(file: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    assert run_all(plan_of(file), results, seeds=1) == []
    assert run_all(plan_of(file), results, seeds=3) == []
    assert run_all(plan_of(file), results, seeds=3) == []
    found = list(tasks_on_disk(results, "mine", "tiny"))
    assert [(task.record.arm, task.record.seed) for task in found] == [
        (arm, seed) for arm in ("adam", "base") for seed in (1, 2, 3)
    ]
    assert [starts(task.folder) for task in found] == [1] * 6
    assert {task.record.state for task in found} == {"done"}
    assert len({task.record.hash for task in found}) == 6
    assert "thread count 1" in (found[0].folder / "task.log").read_text()


def test_a_failed_task_is_named_with_its_log_and_run_again(file: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    failed = run_all(plan_of(file), results, behaviour={"adam": "fail"})
    assert [(record.arm, record.seed) for record in failed] == [("adam", 1), ("adam", 2)]
    assert failed[0].message == "the disk is full. Fix: free space."
    assert failed[0].exit_code == 1
    assert {task.record.state for task in tasks_on_disk(results, "mine", "tiny")} == {
        "done",
        "failed",
    }
    assert run_all(plan_of(file), results) == []
    assert starts(task_folder(results, "mine", "tiny", "adam", 1)) == 2
    assert starts(task_folder(results, "mine", "tiny", "base", 1)) == 1


def test_identical_tasks_of_two_studies_are_run_once(
    file: Path, small_data: PreparedData, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    run_all(plan_of(file), results)
    other = write_study(
        tmp_path / "other.py",
        small_data,
        arms='Arm("base"), Arm("top_1", "architecture.num_experts_per_tok=1")',
    )
    run_all(plan_of(other), results)
    shared = task_folder(results, "other", "tiny", "base", 2)
    assert shared.resolve() == task_folder(results, "mine", "tiny", "base", 2).resolve()
    assert starts(shared) == 1
    found = {task.record.arm: task.record for task in tasks_on_disk(results, "other", "tiny")}
    assert found["base"].study == "other"
    # The results may be moved as a whole.
    results.rename(tmp_path / "moved")
    assert starts(tmp_path / "moved/other/tiny/base/seed_2") == 1


def test_a_study_outlives_the_one_that_it_links_to(
    file: Path, small_data: PreparedData, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    run_all(plan_of(file), results, seeds=1)
    other = write_study(tmp_path / "other.py", small_data)
    run_all(plan_of(other), results, seeds=1)
    link = task_folder(results, "other", "tiny", "base", 1)
    assert link.is_symlink()
    shutil.rmtree(results / "mine")
    assert list(tasks_on_disk(results, "other", "tiny")) == []
    assert run_all(plan_of(other), results, seeds=1) == []
    assert not link.is_symlink()
    assert starts(link) == 1
    # Its link may lead to another twin, too.
    run_all(plan_of(file), results, seeds=1)
    shutil.rmtree(results / "other" / "tiny" / "base")
    link.parent.mkdir()
    link.symlink_to("../gone")
    assert run_all(plan_of(other), results, seeds=1) == []
    assert read_task(link) is not None


@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl"])
def test_a_done_task_without_its_files_is_named(name: str, file: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    run_all(plan_of(file), results, seeds=1)
    folder = task_folder(results, "mine", "tiny", "adam", 1)
    (folder / name).unlink()
    for look in (
        lambda: examine(tasks_of(plan_of(file), results, [1]), results),
        lambda: list(tasks_on_disk(results, "mine", "tiny")),
    ):
        with pytest.raises(InputError, match=rf"adam/seed_1: its task is done, but its {name}"):
            look()
    shutil.rmtree(folder)
    assert run_all(plan_of(file), results, seeds=1) == []
    assert starts(folder) == 1


def test_a_changed_recipe_under_old_results_is_refused(
    file: Path, small_data: PreparedData, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    run_all(plan_of(file), results, seeds=1)
    write_study(file, small_data, common=("optimizer.lr=1e-3",))
    with pytest.raises(InputError, match=r"optimizer.lr: 0.002, now 0.001.*--results"):
        run_all(plan_of(file), results, seeds=1)
    # What changes no number is no change.
    write_study(file, small_data, common=("timeout_minutes=3", "logging.tensorboard=true"))
    assert run_all(plan_of(file), results, seeds=1) == []
    assert starts(task_folder(results, "mine", "tiny", "base", 1)) == 1


def test_changed_data_or_packages_are_another_task(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    before = tasks_of(plan_of(file), results, [1])[0].record
    monkeypatch.setattr("ablations.running.identity.versions", lambda: {"torch": "0.0"})
    after = tasks_of(plan_of(file), results, [1])[0].record
    assert before.hash != after.hash
    assert before.identity["data.train"] == after.identity["data.train"]


def test_the_seed_is_the_runs_and_nothing_else_changes(file: Path, tmp_path: Path) -> None:
    """The seed decides the initial weights and the order of the data; `data.seed` follows it."""
    one, two = (task.run for task in tasks_of(plan_of(file), tmp_path, [1, 2])[::2])
    assert (one.seed, two.seed) == (1, 2)
    assert one.data.seed is None
    assert one.architecture == two.architecture
    assert one.data == two.data


def test_the_stop_rule_of_the_file_ends_a_task_for_good(
    small_data: PreparedData, tmp_path: Path
) -> None:
    file = write_study(
        tmp_path / "mine.py", small_data, more="stop=StopRule(after=0.5, train_loss_above=8.5),"
    )
    results = tmp_path / "results"
    behaviour = {"adam": "wait", "base": "work"}
    assert run_all(plan_of(file), results, seeds=1, behaviour=behaviour) == []
    record = read_task(task_folder(results, "mine", "tiny", "adam", 1))
    assert record is not None
    assert record.state == "early"
    assert record.message == "stop rule: loss 9.000 at step 2 > 8.5"
    assert run_all(plan_of(file), results, seeds=1) == []
    assert starts(task_folder(results, "mine", "tiny", "adam", 1)) == 1


def test_a_rule_that_acted_in_a_job_ends_the_task_for_good(
    small_data: PreparedData, tmp_path: Path
) -> None:
    rule = "stop=StopRule(after=0.5, train_loss_above=8.5),"
    plan = plan_of(write_study(tmp_path / "mine.py", small_data, more=rule))
    results = tmp_path / "results"
    base, adam = tasks_of(plan, results, [1])
    for task in (base, adam):
        task.prepare()
        assert read_limit(task.folder) == LossLimit(step=2, train_loss_above=8.5)
    (adam.folder / ENDED_FILE).write_text('{"reason": "stop rule: loss 9"}')
    assert [entry.todo for entry in examine([base, adam], results)] == ["run", "nothing"]
    (on_disk,) = (task for task in tasks_on_disk(results, "mine", "tiny") if task.record.message)
    assert (on_disk.record.arm, on_disk.record.state) == ("adam", "early")
    # A study that has no rule any more leaves none in the folder.
    (task, _) = tasks_of(plan_of(write_study(tmp_path / "mine.py", small_data)), results, [1])
    task.prepare()
    assert read_limit(task.folder) is None


def test_arms_start_from_one_training_a_seed(small_data: PreparedData, tmp_path: Path) -> None:
    more = 'starts_from={"tiny": "mellum2_tiny_pretrain"},'
    file = write_study(tmp_path / "mine.py", small_data, more=more)
    plan, results = plan_of(file), tmp_path / "results"
    # The start is the base without the arms' common overrides, so its data must fit it.
    tasks = tasks_of(plan_with_small_start(plan), results, [1, 2])
    assert [task.record.arm for task in tasks] == [START, "base", "adam"] * 2
    assert tasks[1].run.checkpoint.load == str(tasks[0].folder)
    assert tasks[1].record.identity["start"] == tasks[0].record.hash
    assert tasks[4].record.identity["start"] == tasks[3].record.hash


def plan_with_small_start(plan: Plan) -> Plan:
    import dataclasses

    return dataclasses.replace(plan, start=plan.arms[0].run)


def test_a_failed_start_fails_the_arms_of_its_seed(
    small_data: PreparedData, tmp_path: Path
) -> None:
    more = 'starts_from={"tiny": "mellum2_tiny_pretrain"},'
    plan = plan_with_small_start(plan_of(write_study(tmp_path / "mine.py", small_data, more=more)))
    results = tmp_path / "results"
    failed = run_all(plan, results, seeds=1, behaviour={START: "fail"})
    assert {record.arm for record in failed} == {START, "base", "adam"}
    assert failed[1].message == "_start seed 1, which it starts from, has failed"
    assert run_all(plan, results, seeds=1) == []
    assert [task.record.arm for task in tasks_on_disk(results, "mine", "tiny")] == ["adam", "base"]


def test_a_task_that_another_runner_has_is_waited_for(file: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    (task, *_) = tasks_of(plan_of(file), results, [1])
    lock = try_lock(results, task.record.hash)
    assert lock is not None
    assert [entry.todo for entry in examine([task], results)] == ["wait"]
    lock.close()
    assert [entry.todo for entry in examine([task], results)] == ["run"]


def test_a_lock_file_of_another_user_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = try_lock(tmp_path, "key")
    assert first is not None
    opened = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    assert try_lock(tmp_path, "key") is None
    first.close()
    second = try_lock(tmp_path, "key")
    assert second is not None
    second.close()
    with pytest.raises(PermissionError):
        try_lock(tmp_path, "new")


def test_places_respect_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert Slots.on_this_machine(2, "cpu", None) == Slots(tasks=3, ranks=2, threads=1)
    assert Slots.on_this_machine(2, "cpu", 1) == Slots(tasks=1, ranks=2, threads=3)
    with pytest.raises(InputError, match="use --parallel 3"):
        Slots.on_this_machine(2, "cpu", 4)
    with pytest.raises(InputError, match="--executor slurm"):
        Slots.on_this_machine(8, "cpu", None)


KILLED = """
import sys
from pathlib import Path
from tests.ablations.test_pool import plan_of, run_all
run_all(plan_of(Path(sys.argv[1])), Path(sys.argv[2]), seeds=1, behaviour={"adam": "wait"})
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_killed_runner_is_continued(how: str, file: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    words = [sys.executable, "-c", KILLED, str(file), str(results)]
    runner = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    waiting = task_folder(results, "mine", "tiny", "adam", 1)
    end = time.monotonic() + 120
    done = task_folder(results, "mine", "tiny", "base", 1) / "latest_checkpointed_iteration.txt"
    while not ((waiting / "starts").is_file() and done.is_file()):
        assert time.monotonic() < end
        assert runner.poll() is None
        time.sleep(0.1)
    runner.send_signal(getattr(signal, how))
    runner.wait(60)
    (task,) = [task for task in tasks_of(plan_of(file), results, [1]) if task.record.arm == "adam"]
    if how == "SIGKILL":
        # Its training lives on, and keeps the task from a second start.
        assert examine([task], results)[0].todo == "wait"
        for process in processes_of(waiting):
            os.kill(process, signal.SIGKILL)
        while examine([task], results)[0].todo == "wait":
            assert time.monotonic() < end
            time.sleep(0.1)
    progress = examine([task], results)[0]
    assert progress.record is not None
    assert (progress.record.state, progress.todo) == ("stopped", "run")
    assert run_all(plan_of(file), results, seeds=1) == []
    assert starts(waiting) == 2
    assert starts(done.parent) == 1


def processes_of(folder: Path) -> list[int]:
    import psutil

    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in (process.info["cmdline"] or [])
    ]


def test_a_damaged_record_is_one_message(file: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    run_all(plan_of(file), results, seeds=1)
    record = task_folder(results, "mine", "tiny", "base", 1) / "task.json"
    record.write_text(json.dumps({"study": 3}))
    with pytest.raises(InputError, match="task"):
        examine(tasks_of(plan_of(file), results, [1]), results)
