"""Failed ranks: the message shown, and the checkpoints left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from launchers.local import FAILURE_FILE, run_local, run_ranks
from mellum2_megatron.checkpoint.folder import TRACKER_FILE, iteration_folder_name
from mellum2_megatron.common.errors import InputError, Mellum2Error, WorkError
from mellum2_megatron.config import to_yaml
from mellum2_megatron.faults.failures import (
    ERROR_FILE_VARIABLE,
    RankFailure,
    explained,
    is_echo,
    only_complete_checkpoints,
    report_failure,
    root_cause,
)
from mellum2_megatron.faults.stop_request import STOPPED
from mellum2_megatron.recipes import recipe
from tests import REPOSITORY


def save(root: Path, iteration: int, *, complete: bool = True, tracked: bool = True) -> None:
    """Write the files of Megatron's save, in its order."""
    folder = root / iteration_folder_name(iteration)
    folder.mkdir(exist_ok=True)
    (folder / "__0_0.distcp").write_text(str(iteration))
    if complete:
        (folder / "metadata.json").write_text("{}")
    if tracked:
        (root / TRACKER_FILE).write_text(str(iteration))


def left(root: Path) -> tuple[list[str], str | None]:
    tracker = root / TRACKER_FILE
    return sorted(
        path.name for path in root.glob("iter_*")
    ), tracker.read_text() if tracker.exists() else None


def test_a_fragment_is_removed_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 9)  # someone has set the tracker back from here
    save(tmp_path, 3)

    def train() -> None:
        save(tmp_path, 4)
        save(tmp_path, 5)
        save(tmp_path, 6, complete=False, tracked=False)
        raise RuntimeError

    with pytest.raises(RuntimeError), only_complete_checkpoints(tmp_path):
        train()
    assert left(tmp_path) == (["iter_0000003", "iter_0000004", "iter_0000005", "iter_0000009"], "5")


def test_the_first_checkpoint_may_be_the_one_that_fails(tmp_path: Path) -> None:
    with only_complete_checkpoints(tmp_path):
        save(tmp_path, 4, complete=False, tracked=False)
    assert left(tmp_path) == ([], None)


def test_a_tracker_that_was_cut_off_is_mended(tmp_path: Path) -> None:
    """Megatron truncates it before it writes."""
    save(tmp_path, 3)
    with only_complete_checkpoints(tmp_path):
        save(tmp_path, 4)
        save(tmp_path, 5, tracked=False)
        save(tmp_path, 6, complete=False, tracked=False)
        (tmp_path / TRACKER_FILE).write_text("")
    assert left(tmp_path) == (["iter_0000003", "iter_0000004", "iter_0000005"], "5")
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with only_complete_checkpoints(tmp_path):
        save(tmp_path, 4, complete=False, tracked=False)
        (tmp_path / TRACKER_FILE).write_text("")
    assert left(tmp_path) == ([], None)


def test_an_imported_release_stays_tracked(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / TRACKER_FILE).write_text("release")
    with only_complete_checkpoints(tmp_path):
        save(tmp_path, 1, complete=False, tracked=False)
    assert left(tmp_path) == ([], "release")
    assert (tmp_path / "release").is_dir()


class CheckpointException(BaseException):
    """As torch.distributed.checkpoint.api's, of 2.15."""

    def __init__(self, step: str, failures: dict[int, tuple[BaseException, None]]) -> None:
        super().__init__(step, failures)
        self.failures = failures


def test_torch_still_has_that_exception() -> None:
    from torch.distributed.checkpoint import CheckpointException as OfTorch

    assert OfTorch.__name__ == CheckpointException.__name__
    assert not issubclass(OfTorch, Exception)
    assert OfTorch("write", {}).args[0] == "write"
    assert OfTorch("write", {}).failures == {}


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full: the run stopped"),
        (
            CheckpointException(
                "write", {1: (OSError(errno.ENOSPC, "No space left on device"), None)}
            ),
            "is full: a check",
        ),
        (
            CheckpointException(
                "write", {1: (RuntimeError("[Errno 28] No space left on device"), None)}
            ),
            "is full: a check",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/y"),
            "the run stopped (Permission denied: /x/y)",
        ),
        (
            CheckpointException("write", {0: (RuntimeError("stale handle"), None)}),
            "written (stale handle)",
        ),
    ],
)
def test_errors_that_a_user_can_mend_are_explained(
    error: BaseException, named: str, tmp_path: Path
) -> None:
    with pytest.raises(WorkError) as caught, explained(tmp_path):
        raise error
    assert named in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_failed_save_without_reason_is_a_full_disk_if_the_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's writer says "unexpected pos 704 vs 598", and Megatron drops even that."""
    error = CheckpointException("write", {0: (RuntimeError("Worker failure"), None)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(WorkError, match="is full"), explained(tmp_path):
        raise error
    monkeypatch.undo()
    with pytest.raises(WorkError, match="Worker failure"), explained(tmp_path):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        InputError("x", rule="y", fix="z"),
        CheckpointException("write", {}),  # every rank but the first: it does not know
        CheckpointException("read", {0: (KeyError("decoder.weight"), None)}),
        RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:3"),
    ],
)
def test_other_errors_are_not_explained(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, explained(tmp_path):
        raise error
    assert caught.value is error


def test_the_cause_is_found_among_the_effects() -> None:
    ended = RankFailure(rank=0, exit_code=-signal.SIGTERM)
    killed = RankFailure(rank=3, exit_code=-signal.SIGKILL)
    echo = RankFailure(rank=1, exit_code=1, kind="echo", message="Connection closed by peer")
    bug = RankFailure(rank=2, exit_code=1, message="ValueError: a bug")
    told = RankFailure(rank=4, exit_code=1, kind="explained", message="the disk is full")
    for failures, cause in (
        ([ended, echo, bug, killed, told], told),
        ([ended, echo, bug], bug),
        ([ended, echo, killed], killed),
        ([ended, echo], echo),
        ([ended], ended),
    ):
        assert root_cause(failures) is cause
    assert "rank 3 was ended by SIGKILL" in str(killed.error(None, Path()))
    assert "rank 2 failed with exit code 1: ValueError: a bug" in str(
        bug.error(Path("failure.txt"), Path())
    )
    assert str(told.error(None, Path())) == "the disk is full"


def test_a_rank_without_launcher_prints_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(InputError("layout.ep=3", rule="must divide", fix="use 4")) == 2
    assert capsys.readouterr().err == "error: rank 0: layout.ep=3: must divide. Fix: use 4.\n"
    assert report(ValueError("a bug")) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("error: rank 0: ValueError: a bug\n")


def report(raised: Exception, *, to_launcher: bool = False) -> int:
    """Report an exception while it is being handled, as a rank does."""
    code = 0
    try:
        raise raised
    except Exception as error:
        code = report_failure(error, to_launcher=to_launcher, verbose=False)
    return code


# -- Under torch's agent
# ----------------------------------------------------------------------------------------------

RANK = """
import os, signal, sys, time
sys.path.insert(0, {repository!r})
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.faults.failures import report_failure
signal.signal(signal.SIGINT, signal.SIG_DFL)
rank = int(os.environ["RANK"])
try:
    {body}
except Exception as error:
    os._exit(report_failure(error, to_launcher=True, verbose=False))
"""

BODIES = {
    "bad input": (
        "raise InputError('layout.ep=3', rule='must divide', fix='use 4')",
        InputError.exit_code,
        "layout.ep=3",
    ),
    "at work": ("raise WorkError(f'rank {rank} is full', fix='free')", 1, "is full. Fix: free."),
    "a bug": (
        "time.sleep(60 * (1 - rank)); raise ValueError('a bug')",
        1,
        "rank 1 failed with exit code 1: ValueError",
    ),
    "a signal": (
        "os.kill(os.getpid(), 9) if rank else time.sleep(60)",
        1,
        "rank 1 was ended by SIGKILL",
    ),
}


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file whose sibling `rank.py` is the ranks' program."""
    command = [sys.executable, str(tmp_path / "rank.py")]
    monkeypatch.setattr("launchers.local.rank_command", lambda *_, **__: command)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(recipe("mellum2_tiny_pretrain_phase1")))
    return file


def write_rank(run_file: Path, body: str) -> None:
    repository = str(REPOSITORY)
    (run_file.parent / "rank.py").write_text(RANK.format(repository=repository, body=body))


@pytest.mark.distributed
@pytest.mark.parametrize("case", BODIES)
def test_one_message_for_all_ranks(
    case: str, run_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body, code, named = BODIES[case]
    write_rank(run_file, body)
    save(run_file.parent, 1)
    with pytest.raises(Mellum2Error) as caught:
        run_local(run_file, nproc=2, device="cpu")
    assert caught.value.exit_code == code
    assert named in str(caught.value)
    assert capfd.readouterr() == ("", "")
    kept = run_file.parent / FAILURE_FILE
    assert kept.exists() == (case == "a bug")
    if kept.exists():
        assert "Traceback" in kept.read_text()
        assert str(kept) in str(caught.value)
    assert left(run_file.parent) == (["iter_0000001"], "1")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 128 + signal.SIGINT), (signal.SIGTERM, STOPPED), (signal.SIGUSR1, STOPPED)],
)
def test_a_signal_ends_ranks_that_do_not_listen_yet(
    number: signal.Signals, code: int, run_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_rank(
        run_file, "open(f'{sys.argv[0]}.{rank}', 'w').write(str(os.getpid())); time.sleep(60)"
    )
    files = [run_file.parent / f"rank.py.{rank}" for rank in range(2)]
    fragment = run_file.parent / "iter_0000004"

    def interrupt() -> None:
        while not all(file.exists() and file.read_text() for file in files):
            time.sleep(0.05)
        fragment.mkdir()
        os.kill(os.getpid(), number)

    before = {
        each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    threading.Thread(target=interrupt, daemon=True).start()
    assert run_local(run_file, nproc=2, device="cpu") == code
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
    assert not fragment.exists()
    assert capfd.readouterr() == ("", "")
    assert {each: signal.getsignal(each) for each in before} == before


@pytest.mark.distributed
def test_all_ranks_succeed(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os; open(__file__ + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'])"
    )
    assert run_ranks([sys.executable, str(script)], nproc=2) == 0
    assert [(tmp_path / f"rank.py{rank}").read_text() for rank in range(2)] == ["2", "2"]


def test_the_report_is_one_that_torch_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(file))
    report(WorkError("the disk is full", fix="free space"), to_launcher=True)
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(file))
    assert json.loads(file.read_text()) == failure.error_file_data
    read = RankFailure.of(1, 1, failure.error_file_data)
    assert (read.kind, read.message) == ("explained", "the disk is full. Fix: free space.")
    assert RankFailure.of(1, -9, {"message": "<NONE>"}) == RankFailure(rank=1, exit_code=-9)


def test_echoes_are_recognised() -> None:
    assert is_echo(CheckpointException("write", {}))
    assert not is_echo(CheckpointException("write", {0: (OSError(), None)}))
    assert is_echo(RuntimeError("... Connection reset by peer"))
    assert not is_echo(RuntimeError("shape mismatch"))
