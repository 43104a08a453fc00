"""Faults of a run on real ranks: killed, stopped, hung, diverging, damaged checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.checkpoint.file_manifest import read_manifest
from mellum2_megatron.checkpoint.folder import is_complete, iteration_folders, tracked_iteration
from mellum2_megatron.config import Run, to_yaml
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.faults.failures import RankFailure, root_cause
from mellum2_megatron.faults.hang_watch import WORK, HangWatch, Place, blame
from mellum2_megatron.faults.stop_request import STOPPED, is_stop
from mellum2_megatron.metrics.log import METRICS_FILE, read_metrics
from tests import REPOSITORY
from tests.checkpoint.test_checkpoints import equal, flip, state
from tests.distributed import DistributedError, run_distributed
from tests.training.test_train import losses, small_run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def ranks(worker: str, run: Run, *args: Any, nproc: int = 2, timeout: float = 120.0) -> list[Any]:
    """Train a run on forked ranks with a fault on one of them (`faults/fault_worker.py`)."""
    output = Path(str(run.checkpoint.output))
    output.mkdir(parents=True, exist_ok=True)
    file = output / "requested.yaml"
    file.write_text(to_yaml(run))
    return run_distributed(
        f"tests.faults.fault_worker:{worker}", nproc, str(file), *args, timeout=timeout
    )


def test_only_steps_since_the_last_save_are_lost(
    trained: Path,
    small_data: PreparedData,
    tmp_path: Path,
) -> None:
    """A training stopped, killed in a step and killed in a save equals an undisturbed one."""
    output = tmp_path / "run"
    run = small_run(small_data, output, "checkpoint.save_interval=2", "checkpoint.keep_last=2")

    assert ranks("signalled", run, 1, 1, signal.SIGUSR1) == [
        False,
        False,
    ]  # one rank hears it, both stop
    assert saved(output) == [1]

    with pytest.raises(DistributedError, match=r"exit codes \[(1|-9), -9\]"):
        ranks("signalled", run, 1, 4, signal.SIGKILL)
    assert saved(output) == [1, 2]

    with pytest.raises(DistributedError, match=r"exit codes \[-9, "):
        ranks("killed_in_save", run, 0, 4)
    assert saved(output) == [1, 2]
    fragment = output / "iter_0000004"
    assert (
        0
        < (fragment / "__0_0.distcp").stat().st_size
        < (output / "iter_0000002" / "__0_0.distcp").stat().st_size
    )
    assert not is_complete(fragment)

    assert ranks("train", run) == [True, True]
    assert saved(output) == [4, 6]
    for name in ("lm_loss", "mtp_loss", "grad_norm", "learning_rate"):
        assert losses(output, name) == losses(trained, name), name
    assert equal(state(trained / "iter_0000006")[0], state(output / "iter_0000006")[0])


def saved(output: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints; the tracker must name the newest."""
    numbers = [
        find_checkpoint(folder).iteration
        for folder in iteration_folders(output)
        if is_complete(folder)
    ]
    assert numbers[-1] == tracked_iteration(output)
    assert all(read_manifest(folder) for folder in iteration_folders(output) if is_complete(folder))
    return [number for number in numbers if number is not None]


def test_command_passes_a_signal_on_and_exits_with_75(
    small_data: PreparedData,
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    steps = [
        "schedule.train_samples=4000",
        "schedule.batch_schedule=[[0,4]]",
        "checkpoint.save_interval=1000",
    ]
    run = small_run(small_data, output, *steps, "logging.eval_iterations=0", "data.workers=2")
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run))
    command = [
        str(Path(sys.executable).with_name("mellum2")),
        "train",
        str(file),
        "--device",
        "cpu",
        "--nproc",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as done:
        while done.poll() is None and not _has_begun(output):
            time.sleep(0.1)
        done.send_signal(signal.SIGTERM)
        shown, errors = done.communicate(timeout=120)
    assert done.returncode == STOPPED == 75, errors
    assert shown.count(f"{run.name} starts anew in {output}\n") == 1
    assert errors.endswith("stopped as asked, all is saved; the same command resumes from here\n")
    last = max(record.step for record in read_metrics(output / METRICS_FILE))
    assert 1 <= last < 1000
    assert saved(output) == [last]


def _has_begun(output: Path) -> bool:
    file = output / METRICS_FILE
    return file.exists() and file.stat().st_size > 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_loss_ends_the_run(
    where: str,
    small_data: PreparedData,
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    with pytest.raises(DistributedError) as caught:
        ranks("not_a_number", small_run(small_data, output), 1, 5, where)
    assert f"the {where} is nan on rank 1 at step 5; nothing was saved after it" in str(
        caught.value
    )
    assert saved(output) == [2, 3]  # at 2 the batch grows
    assert max(losses(output)) == 4


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("sleeping", "rank 1 did not arrive; rank 1 is training, at tests/faults/fault_worker.py:"),
        ("stopped", "rank 1 does not answer; rank 0 is training, at "),
    ],
)
def test_hung_rank_is_named(how: str, named: str, small_data: PreparedData, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(DistributedError) as caught:
        ranks("stuck", small_run(small_data, output, "timeout_minutes=0.05"), 1, 4, how)
    message = str(caught.value)
    assert f"step 4: no micro-batch has begun for 3 seconds: {named}" in message
    assert message.count("no micro-batch has begun") == 1  # one rank speaks for all
    assert "exit codes [1, " in message
    assert saved(output) == [2, 3]


@pytest.mark.parametrize(
    ("where", "work"),
    [("load", "loading the checkpoint"), ("data", "building the data sets")],
)
def test_rank_that_hangs_in_the_set_up_is_named(
    where: str, work: str, trained: Path, small_data: PreparedData, tmp_path: Path
) -> None:
    """A rank that waits for its disk before the first step is named, with what it does."""
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    run = small_run(
        small_data,
        output,
        "schedule.train_samples=48",
        "timeout_minutes=60",
        "setup_timeout_minutes=0.05",
    )
    with pytest.raises(DistributedError) as caught:
        ranks("stuck_in_set_up", run, 1, where)
    message = str(caught.value)
    assert "set-up: no micro-batch has begun for 3 seconds: rank 1 did not arrive" in message
    assert f"rank 1 is {work}, at tests/faults/fault_worker.py:" in message
    assert "raise setup_timeout_minutes" in message
    assert message.count("no micro-batch has begun") == 1  # one rank speaks for all


def test_limit_of_steps_follows_the_first_step(small_data: PreparedData, tmp_path: Path) -> None:
    """The limit of collectives is the set-up's during the first step, and the steps' after it."""
    run = small_run(small_data, tmp_path / "run", "timeout_minutes=1.5", "setup_timeout_minutes=7")
    first, later = ranks("limits_of_collectives", run)[0]
    assert first == [8 * 60.0]
    assert later == [1.5 * 60 + 60]


def test_words_of_the_work_are_of_functions_that_exist() -> None:
    """Each function that a place is described by is where the table says."""
    from importlib import import_module
    from inspect import unwrap

    for file, function, _ in WORK:
        if file.startswith("<frozen"):
            code = vars(sys.modules["importlib._bootstrap"])[function].__code__
        else:
            module = import_module(file.removesuffix(".py").replace("/", "."))
            code = unwrap(vars(module)[function]).__code__
        assert code.co_name == function
        assert code.co_filename.endswith(file)


def test_ranks_that_have_not_met_speak_for_themselves(tmp_path: Path) -> None:
    """Before the process group is there a rank tells its own place, and blames nobody."""
    ends: list[tuple[str, bool]] = []
    watch = HangWatch(
        rank=3,
        world_size=4,
        timeout=10,
        setup_timeout=0.1,
        end=lambda error, first: ends.append((str(error), first)),
        step=pytest.fail,
        output=tmp_path,
        store=lambda: None,
    )
    watch.start()
    deadline = time.monotonic() + 60
    while not ends and time.monotonic() < deadline:
        time.sleep(0.05)
    ((message, first),) = ends
    assert first
    assert "set-up: no micro-batch has begun for 0.1 seconds: rank 3 is at tests/faults/" in message
    assert "cannot ask the others" in message


class MemoryStore(dict[str, str]):
    """A store in memory, with the methods of torch's that the watch uses."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def watch_of(rank: int, store: Any, tmp_path: Path, *, ends: list[str] | None = None) -> HangWatch:
    """Watch of one of three ranks, with a limit of 100 seconds for the set-up."""
    return HangWatch(
        rank=rank,
        world_size=3,
        timeout=10,
        setup_timeout=100 if ends is None else 0.1,
        end=lambda error, first: [] if ends is None else ends.append(str(error)),
        step=pytest.fail,
        output=tmp_path,
        store=store,
    )


def test_the_time_of_the_set_up_begins_when_the_last_rank_has_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process group of NCCL waits for nobody, so a rank has one long before all have met."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("mellum2_megatron.faults.hang_watch.time", clock)
    store = MemoryStore()
    first, second, late = (watch_of(rank, lambda: store, tmp_path) for rank in range(3))
    first._meet()
    second._meet()
    clock.now = 90
    second._meet()
    assert not second._met
    late._meet()
    first._meet()
    second._meet()
    # Now all of them, or none, are overdue: one that is not would count as hung.
    assert [watch.is_overdue(189) for watch in (first, second, late)] == [False] * 3
    assert [watch.is_overdue(191) for watch in (first, second, late)] == [True] * 3


def test_a_rank_that_has_not_arrived_is_named(tmp_path: Path) -> None:
    store, ends = MemoryStore(), list[str]()
    watch_of(0, lambda: store, tmp_path)._meet()
    watch = watch_of(1, lambda: store, tmp_path, ends=ends)
    watch._meet()
    watch._end_run()
    assert "rank 2 has not arrived; rank 1 is at " in ends[0]


def test_the_watch_survives_a_store_that_does_not_answer(tmp_path: Path) -> None:
    """The launcher of the first node holds the store; with it gone a rank still ends."""

    def gone() -> None:
        raise RuntimeError("Connection reset by peer")

    ends: list[str] = []
    watch_of(1, gone, tmp_path, ends=ends).start()
    deadline = time.monotonic() + 60
    while not ends and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "set-up: no micro-batch has begun for 0.1 seconds: rank 1 is at" in ends[0]


def test_ranks_refuse_a_damaged_checkpoint_before_they_train(
    trained: Path,
    small_data: PreparedData,
    tmp_path: Path,
) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    for number in range(2):
        flip(output / "iter_0000006" / f"__{number}_0.distcp")
    before = {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}
    with pytest.raises(
        DistributedError, match=r"InputError: .*iter_0000006/__\d_0.distcp has changed since it was"
    ):
        ranks("train", small_run(small_data, output, "schedule.train_samples=48"))
    (output / "requested.yaml").unlink()
    assert {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()} == {
        path: content for path, content in before.items() if path.name != "requested.yaml"
    }


# -- Who is to blame
# --------------------------------------------------------------------------------------------------

WAITS = Place(beats=7, line="torch/distributed/d.py:1 in all_reduce", waiting=True)
WORKS = Place(beats=7, line="data/loader.py:3 in read", waiting=False)
EARLY = Place(beats=6, line="torch/distributed/d.py:1 in all_reduce", waiting=True)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (
            {0: WAITS, 2: WAITS},
            "rank 1 does not answer; ranks 0, 2 are at torch/distributed/d.py:1 in all_reduce",
        ),
        (
            {1: WAITS},
            "ranks 0, 2 do not answer; rank 1 is at torch/distributed/d.py:1 in all_reduce",
        ),
        (
            {0: WAITS, 1: WAITS, 2: WORKS},
            "rank 2 did not arrive; rank 2 is at data/loader.py:3 in read; "
            "ranks 0, 1 are at torch/distributed/d.py:1 in all_reduce",
        ),
        # A later pipeline stage has begun less, because it waits for the one that hangs.
        (
            {0: EARLY, 1: WORKS, 2: EARLY},
            "rank 1 did not arrive; rank 1 is at data/loader.py:3 in read; "
            "ranks 0, 2 are at torch/distributed/d.py:1 in all_reduce",
        ),
        (
            {0: WAITS, 1: EARLY, 2: WAITS},
            "rank 1 is behind; ranks 1, 0, 2 are at torch/distributed/d.py:1 in all_reduce",
        ),
        (
            {0: replace(WAITS, work="validating"), 1: WORKS, 2: replace(WAITS, work="training")},
            "rank 1 did not arrive; rank 1 is at data/loader.py:3 in read; "
            "rank 0 is validating, at torch/distributed/d.py:1 in all_reduce; "
            "rank 2 is training, at torch/distributed/d.py:1 in all_reduce",
        ),
        ({0: WORKS, 1: WORKS, 2: WORKS}, "ranks 0, 1, 2 are at data/loader.py:3 in read"),
    ],
)
def test_blame_names_the_ranks_that_others_wait_for(places: dict[int, Place], said: str) -> None:
    assert blame(places, 3) == said


def test_save_has_no_time_limit() -> None:
    started = time.monotonic()
    watch = HangWatch(
        rank=0,
        world_size=1,
        timeout=60,
        setup_timeout=600,
        end=pytest.fail,
        step=lambda: 1,
        output=Path(),
        store=pytest.fail,
    )
    assert not watch.is_overdue(started + 599)
    assert watch.is_overdue(time.monotonic() + 601)
    assert watch.count_micro_batches(lambda value: value + 1)(1) == 2
    started = time.monotonic()
    assert not watch.is_overdue(started + 59)
    assert watch.is_overdue(time.monotonic() + 61)
    with watch.paused():
        assert not watch.is_overdue(started + 3600)
        began = time.monotonic()
    assert not watch.is_overdue(began + 59)


@pytest.mark.parametrize(
    ("codes", "signalled", "stop"),
    [
        ([STOPPED, STOPPED], False, True),
        ([STOPPED, -signal.SIGTERM], False, True),  # the agent's, to a rank that was about to leave
        ([-signal.SIGTERM, -signal.SIGTERM], True, True),  # not listening yet: nothing is lost
        ([-signal.SIGTERM, -signal.SIGTERM], False, False),
        ([STOPPED, 1], True, False),
        ([STOPPED, -signal.SIGKILL], True, False),
    ],
)
def test_stop_is_recognised_by_exit_codes(codes: list[int], signalled: bool, stop: bool) -> None:
    assert is_stop(codes, signalled=signalled) is stop


def test_ranks_killed_by_the_agent_are_not_the_cause() -> None:
    """Python handles no SIGTERM during a collective; the agent gives a rank 30 seconds."""
    report = {"message": {"message": "ValueError: a bug", "extraInfo": {"kind": "unexpected"}}}
    failed = RankFailure.of(1, 1, report, ended=1000)
    killed = RankFailure.of(0, -signal.SIGKILL, {}, ended=1030)
    assert root_cause([failed, killed]) == failed
    out_of_memory = RankFailure.of(0, -signal.SIGKILL, {}, ended=1000)
    assert root_cause([failed, out_of_memory]) == out_of_memory
