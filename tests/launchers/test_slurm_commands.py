"""Slurm's recorded answers (22.05), its refusals, and the run's records where it has forgotten."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers import slurm, status
from launchers.slurm import JobState
from mellum2_megatron.common.errors import InputError, WorkError
from tests.cli.runner import mellum2

# Output of `scontrol --oneliner show job` without the fields that are not read.
FAILED = (
    "JobId=2 JobName=tiny UserId=root(0) GroupId=root(0) MCS_label=N/A Account=(null) QOS=(null) "
    "JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1 "
    "Reboot=0 ExitCode=3:0 RunTime=00:00:01 TimeLimit=365-00:00:00 "
    "AllocNode:Sid=localhost:31898 NodeList=n[1-2] BatchHost=n1 NumNodes=2 CPUs/Task=1 "
    "Command=/tmp/a b/job.sbatch WorkDir=/work StdErr=/tmp/a b/logs/tiny-2.log StdIn=/dev/null "
    "StdOut=/tmp/a b/logs/tiny-2.log Power= "
)
WAITING_ARRAY = (
    "JobId=7 ArrayJobId=7 ArrayTaskId=1-2,9%4 JobName=sweep JobState=PENDING Reason=BeginTime "
    "Dependency=(null) Requeue=1 Restarts=0 ExitCode=0:0 RunTime=00:00:00 NodeList= NumNodes=1 "
    "StdOut=/work/logs/sweep-7_4294967294.log Power= "
)
RUNNING_TASK = (
    "JobId=8 ArrayJobId=7 ArrayTaskId=0 JobName=sweep JobState=RUNNING Reason=None "
    "Dependency=(null) Restarts=0 ExitCode=0:0 "
    "RunTime=00:01:04 NodeList=n1 NumNodes=1 StdOut=/work/logs/sweep-7_0.log Power= "
)

Fake = Callable[..., None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Make stand-ins, the only programs on PATH: each prints, records its words and exits."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, out: str = "", err: str = "", code: int = 0) -> None:
        (folder / f"{name}.out").write_text(out)
        (folder / f"{name}.err").write_text(err)
        words = shlex.quote(str(folder / f"{name}.words"))
        body = [f'printf "%s\\n" "$@" > {words}']
        body += [f'while IFS= read -r line; do printf "%s\\n" "$line"; done < {folder}/{name}.out']
        body += [
            f'while IFS= read -r line; do printf "%s\\n" "$line" >&2; done < {folder}/{name}.err',
            f"exit {code}",
        ]
        (folder / name).write_text("#!/bin/bash\n" + "\n".join(body) + "\n")
        (folder / name).chmod(0o755)

    return make


def words(name: str) -> list[str]:
    return Path(os.environ["PATH"], f"{name}.words").read_text().split("\n")[:-1]


def test_a_job(fake: Fake) -> None:
    fake("scontrol", FAILED + "\n")
    assert slurm.states("2") == (
        JobState(
            job_id="2",
            state="FAILED",
            reason="NonZeroExitCode",
            name="tiny",
            nodes="n[1-2]",
            elapsed="00:00:01",
            restarts=1,
            exit_code=3,
            log=Path("/tmp/a b/logs/tiny-2.log"),
        ),
    )
    assert slurm.states("2")[0].finished


def test_tasks_of_an_array_each_have_a_state(fake: Fake) -> None:
    fake("scontrol", f"{WAITING_ARRAY}\n{RUNNING_TASK}\n")
    states = slurm.states("7")
    assert [(state.job_id, state.state, state.reason, state.exit_code) for state in states] == [
        ("7_0", "RUNNING", None, None),
        ("7_1", "PENDING", "BeginTime", None),
        ("7_2", "PENDING", "BeginTime", None),
        ("7_9", "PENDING", "BeginTime", None),
    ]
    assert not any(state.finished for state in states)


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("3", (3,)),
        ("0-2,5%4", (0, 1, 2, 5)),
        ("0-9:3", (0, 3, 6, 9)),
        ("0-1%1", (0, 1)),
        ("1,3,...", (1, 3)),
    ],
)
def test_expand(text: str, tasks: tuple[int, ...]) -> None:
    assert slurm.expand(text) == tasks


UNKNOWN = {"err": "slurm_load_jobs error: Invalid job id specified\n", "code": 1}


def test_a_job_that_slurm_has_forgotten(fake: Fake) -> None:
    fake("scontrol", **UNKNOWN)
    assert slurm.states("2") == ()
    fake("sacct", err="Slurm accounting storage is disabled\n", code=1)
    assert slurm.states("2") == ()


def test_accounting_is_asked_for_what_the_controller_has_forgotten(fake: Fake) -> None:
    fake("scontrol", **UNKNOWN)
    fake(
        "sacct",
        "7_0|CANCELLED by 1000|None|n1|00:03:00|0:15|a|b\n"
        "7_1|COMPLETED|None|n2|00:05:00|0:0|sweep\n"
        "7_2|||||||\n",
    )
    states = slurm.states("7")
    assert [(state.job_id, state.state, state.reason, state.exit_code) for state in states] == [
        ("7_0", "CANCELLED", None, 0),
        ("7_1", "COMPLETED", None, 0),
        ("7_2", "UNKNOWN", None, None),
    ]
    assert states[0].name == "a|b"
    fake("sacct", "7_0|COMPLETED\n")
    with pytest.raises(WorkError, match="seven fields"):
        slurm.states("7")
    fake("sacct", err="sacct: error: slurmdbd: Connection refused\n", code=1)
    with pytest.raises(WorkError, match="Connection refused"):
        slurm.states("7")


def test_without_an_answer_the_records_answer_and_the_reason_is_told(
    fake: Fake, tmp_path: Path
) -> None:
    fake("scontrol", err="Unable to contact slurm controller\n", code=1)
    launch(tmp_path / "run", "12")
    (record,) = status.job_status(tmp_path / "run", "12")
    assert (record.state, record.source) == ("UNKNOWN", "nobody")
    assert "Unable to contact" in record.reason
    attempt(tmp_path / "run", "12", step=3, kind="done")
    (record,) = status.job_status(tmp_path / "run", "12")
    assert (record.state, record.source) == ("COMPLETED", "records")
    assert "records: scontrol: Unable to contact" in record.reason
    with pytest.raises(WorkError):
        status.job_status(None, "12")


def test_submitting_returns_the_number(fake: Fake) -> None:
    fake("sbatch", "41;big\n")
    assert slurm.submit(Path("/a b/job.sbatch"), dependency=["afterok:7", "afterok:8"]) == "41"
    # Without --kill-on-invalid-dep a job waits for ever for one that has failed.
    assert words("sbatch") == [
        "--parsable",
        "--dependency=afterok:7,afterok:8",
        "--kill-on-invalid-dep=yes",
        "/a b/job.sbatch",
    ]
    assert slurm.submit(Path("job.sbatch")) == "41"
    assert words("sbatch") == ["--parsable", "job.sbatch"]


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        (
            "sbatch: error: Batch job submission failed: "
            "Invalid account or account/partition combination specified",
            "account",
        ),
        (
            "sbatch: error: invalid partition specified: nix\n"
            "sbatch: error: Batch job submission failed",
            "sinfo -s",
        ),
        (
            "sbatch: error: Batch job submission failed: "
            "Requested node configuration is not available",
            "sinfo -o",
        ),
        (
            "sbatch: error: Batch job submission failed: "
            "Unable to contact slurm controller (connect failure)",
            "ping",
        ),
        ("sbatch: error: Batch job submission failed: something new", "see what Slurm says"),
    ],
)
def test_slurm_refuses_in_its_own_words(fake: Fake, said: str, fix: str) -> None:
    fake("sbatch", err=said + "\n", code=1)
    with pytest.raises(WorkError) as refused:
        slurm.submit(Path("job.sbatch"))
    assert " ".join(said.split()) in refused.value.what
    assert fix in refused.value.fix


def test_no_slurm_here(fake: Fake) -> None:
    for call in (
        lambda: slurm.submit(Path("x")),
        lambda: slurm.states("1"),
        lambda: slurm.cancel("1"),
    ):
        with pytest.raises(InputError, match=r"not on PATH.*--render sbatch"):
            call()


def test_the_controller_is_down(fake: Fake) -> None:
    fake(
        "scontrol",
        err="slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
        code=1,
    )
    with pytest.raises(WorkError, match="scontrol ping"):
        slurm.states("1")


def shown(state: str) -> str:
    return f"JobId=3 JobName=x JobState={state} Reason=None Restarts=0 ExitCode=0:0\n"


@pytest.mark.parametrize(
    ("state", "code", "err", "done", "note"),
    [
        ("CANCELLED", 0, "", True, "had already ended: CANCELLED"),
        ("COMPLETED", 0, "", True, "had already ended: COMPLETED"),
        ("COMPLETING", 0, "", True, "cancelled: COMPLETING"),
        ("RUNNING", 0, "", False, "not cancelled: Slurm shows RUNNING"),
        (
            "RUNNING",
            1,
            "scancel: error: Kill job error on job id 3: Access/permission denied",
            False,
            "not cancelled: Slurm shows RUNNING (scancel: error: Kill job error on job id 3: "
            "Access/permission denied)",
        ),
        ("SOMETHING_NEW", 0, "", False, "not cancelled: Slurm shows SOMETHING_NEW"),
    ],
)
def test_cancel_tells_what_slurm_confirms(
    state: str,
    code: int,
    err: str,
    done: bool,
    note: str,
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slurm, "_CONFIRM_SECONDS", 0.0)
    fake("scontrol", shown(state))
    fake("scancel", err=f"{err}\n" if err else "", code=code)
    assert slurm.cancel("3") == slurm.Cancellation(job_id="3", done=done, note=note)
    if "ended" not in note:
        assert words("scancel") == ["3"]


def test_cancel_waits_for_slurm(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("scontrol", shown("RUNNING"))
    fake("scancel")
    monkeypatch.setattr("time.sleep", lambda _: fake("scontrol", shown("CANCELLED")))
    assert slurm.cancel("3").note == "cancelled: CANCELLED"


def test_the_command_names_each_job_and_fails_for_the_others(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_CONFIRM_SECONDS", 0.0)
    fake("scancel")
    fake("scontrol", **UNKNOWN)
    result = mellum2("launch", "cancel", "3", "4")
    assert result.code == 1
    assert "3: not found" in result.out
    assert "4: not found" in result.out
    assert "3, 4 not cancelled" in result.err
    fake("scontrol", shown("COMPLETING"))
    result = mellum2("launch", "cancel", "3")
    assert (result.code, result.out) == (0, "3: cancelled: COMPLETING\n")


def test_the_table_keeps_the_end_of_a_folder(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    fake("scontrol", shown("RUNNING"))
    folders = [tmp_path / "chain" / f"mellum2_12b_pretrain_a_long_name_{n}" for n in range(3)]
    for folder in folders:
        launch(folder, "3")
    out = "".join(mellum2("launch", "status", "--runs", "chain").out.split())
    for number in range(3):
        # Folded over lines, no character is lost.
        assert f"chain/mellum2_12b_pretrain_a_long_name_{number}" in out
    assert "\u2026" not in out


@pytest.mark.parametrize("word", ["x", "1_", "1_a", "-1", "1.5"])
def test_no_number_of_slurm(word: str) -> None:
    with pytest.raises(InputError):
        slurm.job_number(word)


# ------------------------------------------------------------------------------
# With the run's own records
# ------------------------------------------------------------------------------


def launch(folder: Path, job_id: str, **more: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entry = {
        "time": "2026-05-04T10:00:00+00:00",
        "executor": "slurm",
        "job_id": job_id,
        "profile": "p",
        "nodes": 2,
        "ranks_per_node": 4,
    }
    entry |= {"device": "cpu", "code": {}, "packager": "shared", "of a later version": 1, **more}
    (folder / "launch.json").write_text(json.dumps({"launches": [entry]}))


def attempt(
    folder: Path,
    job_id: str,
    *,
    step: int,
    kind: str | None,
    restart: int = 0,
    series: str = "",
    hour: int = 11,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    start = {
        "event": "begin",
        "job": job_id,
        "restart": restart,
        "series": series or job_id,
        "step": 0,
    }
    start["time"] = f"2026-05-04T{hour:02}:00:00+00:00"
    lines = [start]
    if kind is not None:
        lines += [
            {**start, "event": "end", "step": step, "code": 0, "kind": kind, "reason": f"it {kind}"}
        ]
    with (folder / "attempts.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_records_answer_where_slurm_has_forgotten(fake: Fake, tmp_path: Path) -> None:
    fake("scontrol", **UNKNOWN)
    launch(tmp_path / "run", "12")
    attempt(tmp_path / "run", "12", step=4, kind="stopped")
    attempt(tmp_path / "run", "12", step=9, kind="done", restart=1)
    (record,) = status.job_status(*status.find_job(str(tmp_path / "run")))
    assert (record.job_id, record.state, record.source, record.step, record.attempts) == (
        "12",
        "COMPLETED",
        "records",
        9,
        2,
    )


def test_job_without_any_record_is_unknown(fake: Fake, tmp_path: Path) -> None:
    fake("scontrol", **UNKNOWN)
    launch(tmp_path / "run", "12")
    (record,) = status.job_status(*status.find_job(str(tmp_path / "run")))
    assert (record.state, record.source) == ("UNKNOWN", "nobody")
    assert "no longer has" in record.reason


def test_every_task_of_an_array_has_its_own_records(fake: Fake, tmp_path: Path) -> None:
    fake("scontrol", **UNKNOWN)
    launch(tmp_path / "run", "12", tasks=2)
    attempt(tmp_path / "run" / "0", "12", step=3, kind="done")
    attempt(tmp_path / "run" / "1", "13", step=2, kind="failed", series="13")
    tasks = status.job_status(*status.find_job(str(tmp_path / "run")))
    assert [(task.job_id, task.state, task.step) for task in tasks] == [
        ("12_0", "COMPLETED", 3),
        ("12_1", "FAILED", 2),
    ]
    assert status.find_job(str(tmp_path / "run" / "1")) == (tmp_path / "run", "12_1")
    assert status.job_status(*status.find_job(str(tmp_path / "run" / "1"))) == tasks[1:]


def test_a_folder_names_its_job_also_when_another_one_continues_it(
    fake: Fake, tmp_path: Path
) -> None:
    launch(tmp_path / "run", "12")
    assert status.find_job(str(tmp_path / "run")) == (tmp_path / "run", "12")
    attempt(tmp_path / "run", "12", step=4, kind="stopped")
    attempt(tmp_path / "run", "20", step=5, kind=None, series="12")
    assert status.find_job(str(tmp_path / "run")) == (tmp_path / "run", "20")
    # Launched again, the new job not started yet; then a job submitted by hand.
    launch(tmp_path / "old", "41")
    attempt(tmp_path / "old", "40", step=5, kind="failed", hour=9)
    assert status.find_job(str(tmp_path / "old")) == (tmp_path / "old", "41")
    attempt(tmp_path / "old", "42", step=5, kind=None, hour=12)
    assert status.find_job(str(tmp_path / "old")) == (tmp_path / "old", "42")
    attempt(tmp_path / "by hand", "31", step=5, kind=None)
    assert status.find_job(str(tmp_path / "by hand")) == (tmp_path / "by hand", "31")


def test_a_folder_with_a_job_takes_no_second_one(fake: Fake, tmp_path: Path) -> None:
    status.require_idle(tmp_path / "new")  # without a call of Slurm
    launch(tmp_path / "run", "7")
    fake("scontrol", WAITING_ARRAY + "\n")
    with pytest.raises(InputError, match=r"job 7_1 is PENDING.*mellum2 launch cancel 7_1"):
        status.require_idle(tmp_path / "run")
    fake("scontrol", FAILED + "\n")
    status.require_idle(tmp_path / "run")
    attempt(tmp_path / "by hand", "8", step=5, kind=None)
    fake("scontrol", RUNNING_TASK + "\n")
    with pytest.raises(InputError, match="7_0 is RUNNING"):
        status.require_idle(tmp_path / "by hand")
    fake("scontrol", **UNKNOWN)
    status.require_idle(tmp_path / "by hand")


def test_a_number_names_its_folder_through_its_log(fake: Fake) -> None:
    fake("scontrol", FAILED + "\n")
    assert status.find_job("2") == (Path("/tmp/a b"), "2")
    fake("scontrol", **UNKNOWN)
    assert status.find_job("2") == (None, "2")


def test_a_folder_without_a_launch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder or job"):
        status.find_job(str(tmp_path / "nix"))
    with pytest.raises(InputError, match="nothing was launched"):
        status.find_job(str(tmp_path))
    launch(tmp_path / "here", "x", executor="local")
    with pytest.raises(InputError, match="on this machine"):
        status.find_job(str(tmp_path / "here"))


def test_logs_by_node_and_rank(tmp_path: Path) -> None:
    launch(tmp_path, "12")
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in (
        "x-12-12.log",
        "x-12-12-node0.log",
        "x-12-12-node1.log",
        "x-12-120.log",
        "x-12-120-node0.log",
    ):
        (logs / name).write_text(name)
    script, nodes = status.log_files(tmp_path, "12")
    assert script == logs / "x-12-12.log"
    assert nodes == {0: logs / "x-12-12-node0.log", 1: logs / "x-12-12-node1.log"}
    assert status.rank_log(tmp_path, "12", 3) == logs / "x-12-12-node0.log"
    assert status.rank_log(tmp_path, "12", 4) == logs / "x-12-12-node1.log"
    assert status.rank_log(tmp_path, "12") == logs / "x-12-12-node1.log"
    assert status.rank_log(tmp_path, "120") is None  # not there yet
    with pytest.raises(InputError, match="ranks 0 to 7"):
        status.rank_log(tmp_path, "12", 8)


def test_following_shows_each_line_once_and_ends_with_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "POLL_SECONDS", 0.0)
    log = tmp_path / "log"
    # Contents of the log before each look: no file, empty, a line and a half, two and a half, all
    # without a final newline.
    chapters = iter([None, "", "one\ntw", "one\ntwo\nthr", "one\ntwo\nthree"])
    left = [4]

    def ended() -> bool:
        chapter = next(chapters)
        if chapter is not None:
            log.write_text(chapter)
        left[0] -= 1
        return left[0] < 0

    assert list(status.follow(lambda: log, ended)) == ["one", "two", "three"]
