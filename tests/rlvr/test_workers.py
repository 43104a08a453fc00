"""Reward functions of one's own, and the processes that judge."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.limited_process import LimitError
from mellum2_megatron.rlvr.rewards import verifiers, worker
from mellum2_megatron.rlvr.rewards.verdict import Answer, ArgumentsError
from mellum2_megatron.rlvr.rewards.verifiers import VERIFIERS, find_verifier


def own(folder: Path, body: str) -> Any:
    (folder / "rewards.py").write_text(
        f"import time\ndef reward(answer, **arguments):\n    {body}\n"
    )
    return find_verifier("rewards.py:reward", folder)


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    verifier = own(tmp_path, "print('x')\n    return answer.count('a') / arguments['most']")
    assert verifier.check({"most": 4}, []) == []
    assert verifier.score(Answer(text="banana"), {"most": 4}, []).reward == 0.75


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1.5", "the reward 1.5"),
        ("return -1", "the reward -1"),
        ("return 'good'", "the reward 'good'"),
        ("return None", "the reward null"),
        ("return float('nan')", "it returns nan"),
        ("return 10 ** 10 ** 4", "OverflowError"),
        ("return [1] * 10 ** 6", r"it returns \[1, 1"),
        ("import os; os._exit(0)", "its process ends with exit code 0"),
        ("import os; os._exit(3)", "its process ends with exit code 3"),
        ("import os; os.closerange(0, 99)", "its process ends with exit code 1"),
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
    ],
)
def test_a_reward_that_lies_about_its_range(body: str, message: str, tmp_path: Path) -> None:
    verifier = own(tmp_path, body)
    with pytest.raises(WorkError, match=message):
        verifier.score(Answer(text="x"), {}, [])
    with pytest.raises(ArgumentsError, match=message):
        verifier.check({}, [])


@pytest.mark.parametrize(
    ("body", "reward"),
    [
        ("import numpy; return numpy.float32(0.5)", 0.5),
        ("return True", 1),
        ("import fractions; return fractions.Fraction(1, 4)", 0.25),
    ],
)
def test_all_kinds_of_numbers_are_rewards(body: str, reward: float, tmp_path: Path) -> None:
    assert own(tmp_path, body).score(Answer(text="x"), {}, []).reward == reward


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return len(bytearray(1 << 40))", "more than 4 GiB"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 40)", "ended by signal 40"),
    ],
)
def test_an_answer_that_is_too_much_for_a_function_is_worth_0(
    body: str, reason: str, tmp_path: Path
) -> None:
    verdict = own(tmp_path, body).score(Answer(text="x"), {}, [])
    assert verdict.reward == 0
    assert reason in verdict.reason


def test_a_function_that_is_not_in_its_file_is_named(tmp_path: Path) -> None:
    own(tmp_path, "return 1")
    with pytest.raises(ArgumentsError, match="the file has no rewards"):
        find_verifier("rewards.py:rewards", tmp_path).check({}, [])


@pytest.mark.parametrize("body", ["time.sleep(60)", "import os; os.abort()"])
def test_a_function_that_never_answers_is_refused(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer would be worth 0, and all groups flat."""
    monkeypatch.setattr(verifiers, "ask", functools.partial(verifiers.ask, seconds=1.0))
    with pytest.raises(ArgumentsError, match="for an empty answer: it"):
        own(tmp_path, body).check({}, [])


def test_a_schema_that_takes_forever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task's own call is matched with its tool's pattern, before any answer is."""
    monkeypatch.setattr(verifiers, "ask", functools.partial(verifiers.ask, seconds=1.0))
    text = {"type": "string", "pattern": "^(a+)+$"}
    schema = {"type": "object", "properties": {"text": text}}
    tool = {"type": "function", "function": {"name": "say", "parameters": schema}}
    call = {"name": "say", "arguments": {"text": "a" * 40 + "b"}}
    with pytest.raises(ArgumentsError, match="does not fit its tool: it takes longer than 1 s"):
        find_verifier("tool_calls", Path()).check({"calls": [call]}, [tool])


# -- The workers -----------------------------------------------------------------------------------


def test_a_worker_that_hangs_or_dies_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "import os, time\ndef reward(answer):\n"
        "    if answer == 'hang':\n        time.sleep(600)\n"
        "    if answer == 'die':\n        os._exit(1)\n"
        "    if answer == 'eat':\n        return len(bytearray(1 << 40))\n"
        "    return 1\n"
    )
    job = {"kind": "own", "path": str(tmp_path / "r.py"), "name": "reward", "arguments": {}}
    limits = (("hang", "longer than 0.3 s"), ("die", "exit code 1"), ("eat", "more than 4 GiB"))
    for answer, message in limits:
        with pytest.raises(LimitError, match=message):
            worker.ask({**job, "answer": answer}, seconds=0.3 if answer == "hang" else 20)
        assert worker.ask({**job, "answer": "x"}) == {"reward": 1}


def test_a_function_that_closes_the_channel_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_GONE_S", 0.1)
    with pytest.raises(WorkError, match="its process closes the files"):
        own(tmp_path, "import os; os.closerange(0, 99); time.sleep(60)").score(
            Answer(text="x"), {}, []
        )


def test_a_job_whose_worker_is_killed_is_given_to_another(tmp_path: Path) -> None:
    """As by the kernel, for the memory that other processes took."""
    (tmp_path / "r.py").write_text(
        "import os, pathlib\ndef reward(answer, times):\n"
        "    log = pathlib.Path(__file__).with_name('log')\n"
        "    log.write_text(log.read_text() + 'x' if log.exists() else 'x')\n"
        "    if len(log.read_text()) <= times: os.kill(os.getpid(), 9)\n"
        "    return 1\n"
    )
    verifier = find_verifier("r.py:reward", tmp_path)
    assert verifier.score(Answer(text=""), {"times": 1}, []).reward == 1
    (tmp_path / "log").unlink()
    verdict = verifier.score(Answer(text=""), {"times": 9}, [])
    assert (verdict.reward, "was killed" in verdict.reason) == (0, True)
    assert (tmp_path / "log").read_text() == "xx"


def test_a_worker_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_idle", [])
    monkeypatch.setattr(worker, "_SCRIPT", Path("/nonexistent.py"))
    with pytest.raises(WorkError, match="did not start: its process ends with exit code 2"):
        VERIFIERS["math"].score(Answer(text=r"\boxed{7}"), {"answer": "7"}, [])


def test_a_worker_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "import subprocess, time\ndef reward(answer):\n"
        "    subprocess.Popen(['sleep', '77777'])\n    time.sleep(600)\n"
    )
    job = {"kind": "own", "path": str(tmp_path / "r.py"), "name": "reward", "arguments": {}}
    with pytest.raises(LimitError, match="longer than 1 s"):
        worker.ask({**job, "answer": ""}, seconds=1)
    sleeping = [
        one for one in psutil.process_iter(["cmdline"]) if "77777" in (one.info["cmdline"] or ())
    ]
    assert not psutil.wait_procs(sleeping, timeout=20)[1]


def test_a_job_that_nobody_waits_for_ends() -> None:
    """As of a run that was killed: no other process looks at the time."""
    program = (
        f"import sys; sys.path.append({str(Path(worker.__file__).parent)!r})\n"
        "import worker_script\nworker_script._CPU_SECONDS = 0.3\nworker_script._main()"
    )
    job = {"kind": "pattern", "pattern": "(a+)+b", "text": "a" * 60}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, input=json.dumps(job) + "\n", text=True, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (-signal.SIGPROF, "{}\n")


def test_a_worker_killed_while_it_waits_fails_no_job() -> None:
    job = {"kind": "pattern", "pattern": "a", "text": "a"}
    assert worker.ask(job) == {"fault": ""}
    for child in psutil.Process().children():
        if "worker_script" in " ".join(child.cmdline()):
            child.kill()
    time.sleep(0.1)  # until the kernel has ended them; only the worker may wait for them
    assert worker.ask(job) == {"fault": ""}


def test_many_threads_ask_at_once() -> None:
    jobs = [
        {"kind": "pattern", "pattern": str(number), "text": str(number // 2 * 2)}
        for number in range(40)
    ]
    with ThreadPoolExecutor(4) as pool:
        faults = [answer["fault"] for answer in pool.map(worker.ask, jobs)]
    assert [not fault for fault in faults] == [number % 2 == 0 for number in range(40)]
