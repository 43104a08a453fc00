"""Decisions after an attempt's end, and the records behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from launchers import outcome
from launchers.early_end import ENDED_FILE
from launchers.outcome import (
    Attempt,
    Kind,
    Report,
    decide,
    failures_in_place,
    finish_attempt,
    judge,
    read_attempts,
    start_attempt,
)
from mellum2_megatron.checkpoint.folder import write_tracker
from mellum2_megatron.faults.failures import RankFailure

KILLED = RankFailure(rank=1, exit_code=-9, ended=100)
ECHO = RankFailure(
    rank=0, exit_code=1, kind="echo", message="RuntimeError: Connection closed by peer", ended=101
)
BAD = RankFailure(
    rank=0, exit_code=2, kind="explained", message="data.path=x: gone. Fix: bring it back."
)


def attempts(*ends: tuple[Kind | None, int]) -> list[Attempt]:
    """Return attempts of one job, each from the kind and the step of its end."""
    return [
        Attempt(
            job="7",
            restart=number,
            series="7",
            started="",
            start_step=0,
            kind=kind,
            step=step,
            code=1,
            ended="",
        )
        for number, (kind, step) in enumerate(ends)
    ]


@pytest.mark.parametrize(
    ("code", "reports", "told", "expected"),
    [
        (0, [], "", ("done", 0)),
        (75, [Report(node="a", code=75), Report(node="b", code=75)], "USR1", ("stopped", 75)),
        # Signalled by hand: scancel -s.
        (75, [Report(node="a", code=75), Report(node="b", code=75)], "", ("stopped", 75)),
        (138, [], "USR1", ("stopped", 75)),  # before a handler was installed
        (138, [Report(node="a", code=75)], "USR1", ("stopped", 75)),
        (138, [], "", ("failed", 1)),
        # srun --wait killed the other node.
        (137, [Report(node="a", code=75)], "", ("stopped", 75)),
        (143, [], "TERM", ("ended", 75)),
        (75, [Report(node="a", code=75)], "TERM", ("ended", 75)),
        (137, [], "TERM", ("ended", 75)),
        (
            1,
            [
                Report(node="a", code=1, failures=(ECHO,)),
                Report(node="b", code=1, failures=(KILLED,)),
            ],
            "",
            ("failed", 1),
        ),
        (
            1,
            [Report(node="a", code=75), Report(node="b", code=1, failures=(KILLED,))],
            "USR1",
            ("failed", 1),
        ),
        (2, [Report(node="a", code=2, failures=(BAD,), message="gone")], "", ("refused", 2)),
        (137, [Report(node="a", code=2, failures=(BAD,), message="gone")], "", ("refused", 2)),
        (2, [Report(node="a", code=2, message="gone")], "TERM", ("refused", 2)),
        (137, [], "", ("failed", 1)),
        (
            1,
            [Report(node="a", code=1, message="the 2 nodes did not meet at a:1")],
            "",
            ("failed", 1),
        ),
    ],
)
def test_end_of_an_attempt_is_judged(
    code: int, reports: Sequence[Report], told: str, expected: tuple[str, int]
):
    assert judge(code, reports, told)[:2] == expected


def test_the_reason_is_the_cause_on_whatever_node():
    reports = [
        Report(node="a", code=1, failures=(ECHO,)),
        Report(node="b", code=1, failures=(KILLED,)),
    ]
    assert judge(1, reports, "")[2].startswith("node b: rank 1 was ended by SIGKILL")
    assert (
        judge(2, [Report(node="a", code=2, failures=(BAD,), message=BAD.message)], "")[2]
        == f"node a: {BAD.message}"
    )
    assert judge(1, [Report(node="c", code=1, message="no port")], "")[2] == "node c: no port"
    assert "see the log of each node" in judge(137, [], "")[2]


@pytest.mark.parametrize(
    ("ends", "count"),
    [
        ([("failed", 4)], 1),
        ([("failed", 4), ("failed", 4)], 2),
        ([("failed", 4), ("failed", 6)], 1),  # it got further
        # Further than the last attempt, not than all before.
        ([("failed", 6), ("failed", 4), ("failed", 5)], 3),
        # A stop neither counts nor resets the count.
        ([("failed", 4), ("stopped", 4), ("failed", 4)], 2),
        ([("failed", 4), ("stopped", 5), ("failed", 5)], 1),
        ([(None, 4), (None, 4)], 2),  # the nodes failed
        ([("ended", 4), ("ended", 4), ("ended", 4), ("ended", 4)], 0),  # preempted without a step
    ],
)
def test_failures_count_until_a_new_step_is_reached(
    ends: list[tuple[Kind | None, int]], count: int
):
    assert failures_in_place(attempts(*ends)) == count


@pytest.mark.parametrize(
    ("ends", "tries", "again"),
    [
        ([("done", 9)], 3, False),
        ([("stopped", 0)], 0, True),
        ([("ended", 4)], 3, False),  # Slurm requeues preempted jobs itself
        ([("refused", 0)], 3, False),
        ([("failed", 4)], 0, False),
        ([("failed", 4)], 1, True),
        ([("failed", 4), ("failed", 4)], 1, False),
        ([("failed", 4), ("failed", 5)], 1, True),
        ([("failed", 4)] * 3, 3, True),
        ([("failed", 4)] * 4, 3, False),
    ],
)
def test_decision(ends: list[tuple[Kind | None, int]], tries: int, again: bool):
    assert decide(attempts(*ends), tries=tries).restart == again


def test_messages():
    assert "step 4 has not been passed in 1 start: starting again, 1 of 3 tries" in message(
        ("failed", 4)
    )
    assert "not been passed in 4 starts: not started again (tries in the profile)" in message(
        *[("failed", 4)] * 4
    )
    assert "resumes from step 8 when Slurm starts it again" in message(("stopped", 8))
    assert "the same would be refused again" in message(("refused", 0))


def message(*ends: tuple[Kind | None, int]) -> str:
    return decide(attempts(*ends), tries=3).message


def start(
    monkeypatch: pytest.MonkeyPatch, job: int, restart: int = 0, series: int | None = None
) -> None:
    """Set the variables of a job."""
    monkeypatch.setenv("SLURM_JOB_ID", str(job))
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    monkeypatch.setenv("MELLUM2_SERIES", str(series or job))


def reach(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": step, "lm_loss": 1.0}) + "\n")


def test_a_job_from_begin_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start(monkeypatch, 7)
    assert start_attempt(tmp_path, tries=1) is None
    reach(tmp_path, 4)
    outcome.write_report(tmp_path, 0, Report(node="a", code=1, failures=(ECHO,), message="x"))
    outcome.write_report(tmp_path, 1, Report(node="b", code=1, failures=(KILLED,), message="y"))
    assert finish_attempt(tmp_path, code=1, tries=1).restart
    start(monkeypatch, 7, restart=1)
    assert start_attempt(tmp_path, tries=1) is None
    # The reports of the first attempt do not count for the second.
    assert not finish_attempt(tmp_path, code=137, tries=1).restart
    first, second = read_attempts(tmp_path)
    assert (first.kind, first.start_step, first.step, first.code) == ("failed", 0, 4, 1)
    assert first.reason.startswith("node b: rank 1 was ended by SIGKILL")
    assert (second.kind, second.start_step, second.step) == ("failed", 4, 4)

    start(monkeypatch, 8)  # submitted anew: the count starts from zero
    assert start_attempt(tmp_path, tries=1) is None
    assert finish_attempt(tmp_path, code=1, tries=1).restart
    start(monkeypatch, 9, series=8)  # a continuation counts on
    assert start_attempt(tmp_path, tries=1) is None
    assert not finish_attempt(tmp_path, code=1, tries=1).restart


def test_an_early_end_is_no_reason_to_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert start_attempt(tmp_path, tries=3) is None
    (tmp_path / ENDED_FILE).write_text('{"reason": "stop rule: loss 9 at step 2 > 8"}')
    decision = finish_attempt(tmp_path, code=75, tries=3)
    assert (decision.kind, decision.restart) == ("early", False)
    assert decision.message == "ended at step 0, stop rule: loss 9 at step 2 > 8"


def test_nodes_that_fail_leave_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start(monkeypatch, 7)
    assert start_attempt(tmp_path, tries=1) is None
    write_tracker(tmp_path, 3)
    start(monkeypatch, 7, restart=1)
    assert start_attempt(tmp_path, tries=1) is None
    assert (read_attempts(tmp_path)[0].kind, read_attempts(tmp_path)[0].step) == ("failed", 3)
    start(monkeypatch, 7, restart=2)
    refusal = start_attempt(tmp_path, tries=1)
    assert refusal is not None
    assert "step 3 has not been passed in 2 starts" in refusal.message


def test_a_preempted_attempt_that_was_cut_off_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for restart in range(4):
        start(monkeypatch, 7, restart=restart)
        assert start_attempt(tmp_path, tries=0) is None
        outcome.write_report(tmp_path, 0, Report(node="a", code=75))
    assert [attempt.kind for attempt in read_attempts(tmp_path)] == [
        "stopped",
        "stopped",
        "stopped",
        None,
    ]


def test_an_end_without_a_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Node 0's agent may die before it records the start."""
    start(monkeypatch, 7)
    assert finish_attempt(tmp_path, code=1, tries=1).restart
    start(monkeypatch, 7, restart=1)
    assert not finish_attempt(tmp_path, code=1, tries=1).restart


def test_the_step_reached(tmp_path: Path):
    assert outcome.reached_step(tmp_path) == 0
    for step in range(1, 2000):
        reach(tmp_path, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 20')
    assert outcome.reached_step(tmp_path) == 1999
    write_tracker(tmp_path, 2000)
    assert outcome.reached_step(tmp_path) == 2000


def test_records_that_a_crash_has_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start(monkeypatch, 7)
    start_attempt(tmp_path, tries=1)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "en')
    assert len(read_attempts(tmp_path)) == 1
    start(monkeypatch, 7, restart=1)
    start_attempt(tmp_path, tries=1)
    assert [attempt.restart for attempt in read_attempts(tmp_path)] == [0, 1]


def test_long_reasons_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start(monkeypatch, 7)
    outcome.write_report(tmp_path, 0, Report(node="a", code=1, message="x" * 5000 + "the end"))
    finish_attempt(tmp_path, code=1, tries=1)
    reason = read_attempts(tmp_path)[0].reason
    assert len(reason) < 650
    assert reason.startswith("node a: x")
    assert reason.endswith("the end")


@pytest.mark.parametrize(("code", "status"), [(75, 0), (1, 1), (2, 2)])
def test_the_command(
    code: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    start(monkeypatch, 7)
    outcome.write_report(tmp_path, 0, Report(node="a", code=code, message="because"))
    assert (
        outcome.main([str(tmp_path), "--code", str(code), "--told", "", "--tries", "0"]) == status
    )
    assert capsys.readouterr().err.startswith("mellum2: ")
