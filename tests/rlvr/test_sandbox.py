"""Hostile programs: none gets out, none takes the machine down, none wins."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.rlvr.rewards.bubblewrap import Bubblewrap
from mellum2_megatron.rlvr.rewards.sandbox import Limits, find_sandbox
from mellum2_megatron.rlvr.rewards.watch import PROGRAM
from tests.rlvr.attacked import TIGHT, Attacked
from tests.rlvr.hostile_programs import CHEATS, ESCAPED, ESCAPES, EXHAUSTING, PORT, SECRET_PATH
from tests.sandbox import needs_sandbox

pytestmark = [needs_sandbox, pytest.mark.slow]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    result = Attacked(tmp_path_factory.mktemp("user"))
    yield result
    result.close()


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_gets_out(name: str, attacked: Attacked) -> None:
    outcome = attacked.runs[name].result()
    assert outcome.stopped is None
    assert outcome.output.strip(), "the attempt was not made"
    assert ESCAPED.encode() not in outcome.output


@pytest.mark.parametrize("name", EXHAUSTING)
def test_limits_hold(name: str, attacked: Attacked) -> None:
    outcome = attacked.runs[name].result()
    assert re.search(EXHAUSTING[name][1], outcome.reason + outcome.message), outcome.reason
    assert len(outcome.output) <= TIGHT.output_bytes


@pytest.mark.parametrize("name", CHEATS)
def test_nobody_wins_by_a_lie(name: str, attacked: Attacked) -> None:
    verdict = attacked.verdicts[name].result()
    assert verdict.reward == 0
    assert verdict.reason


def test_the_list_is_long() -> None:
    assert len(ESCAPES) + len(EXHAUSTING) + len(CHEATS) >= 145


def programs_of_nobody_else() -> list[str]:
    """Return the commands of programs that no other test process has started.

    pytest-xdist runs other files with programs at the same time, from processes beside this one. A
    program that outlived its sandbox is a child of the machine's first process.
    """
    beside: set[int] = set()
    if "PYTEST_XDIST_WORKER" in os.environ:
        beside = {one.pid for one in psutil.Process(os.getppid()).children()} - {os.getpid()}
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if PROGRAM in command and not beside & {one.pid for one in process.parents()}:
                left.append(command)
    return left


def test_nothing_is_left(attacked: Attacked) -> None:
    attacked.pool.shutdown()
    assert attacked.secret.read_text() == "of the user"
    attacked.listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        attacked.listener.accept()
    deadline = time.monotonic() + 10
    while (left := programs_of_nobody_else()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert not list(Path("/dev/shm").glob("x"))


@pytest.mark.parametrize("name", ["secret_file", "loopback", "write_input", "memory_file"])
def test_the_attempts_work_outside(name: str, attacked: Attacked) -> None:
    """Otherwise a misspelt program would count as held."""
    port = str(attacked.listener.getsockname()[1])
    program = ESCAPES[name].replace(SECRET_PATH, str(attacked.secret)).replace(PORT, port)
    with (attacked.secret.parent / "input").open("w+b") as given:
        done = subprocess.run(
            [sys.executable, "-c", program], stdin=given, capture_output=True, text=True, check=True
        )
    assert ESCAPED in done.stdout
    if name == "loopback":
        attacked.listener.setblocking(True)
        attacked.listener.accept()[0].close()


def test_a_program_gets_its_input_and_its_exit_code() -> None:
    outcome = find_sandbox().run("import sys\nprint(input())\nsys.exit(3)", stdin=b"hello\n")
    assert (outcome.output, outcome.exit_code, outcome.stopped) == (b"hello\n", 3, None)
    assert outcome.reason == "exit code 3"


def test_a_python_with_a_shared_library_finds_it() -> None:
    """An ordinary user's own Python is in the sandbox at another path than where it was built."""
    sandbox = find_sandbox()
    assert isinstance(sandbox, Bubblewrap)
    for python, directory in ((None, None), (Path("/home/user/python"), "/opt/python/lib")):
        words = dataclasses.replace(sandbox, python=python)._command(
            Limits(), source=3, syscalls=4, status=5
        )
        given = dict(itertools.pairwise(words)).get("LD_LIBRARY_PATH")
        assert given == directory


def test_ten_programs_do_not_share_a_limit() -> None:
    """The limit of processes is one of a sandbox, not one of the user."""
    program = "import os, time\nif os.fork():\n    os.wait()\nelse:\n    time.sleep(0.5)"
    with ThreadPoolExecutor(10) as pool:
        limits = Limits(processes=4)
        runs = [pool.submit(find_sandbox().run, program, limits=limits) for _ in range(10)]
    assert [run.result().reason for run in runs] == [""] * 10


@pytest.mark.parametrize("limit", ["seconds", "memory_bytes", "processes", "output_bytes"])
def test_limits_are_above_0(limit: str) -> None:
    with pytest.raises(InputError, match=f"limits.{limit}"):
        Limits(**{limit: 0})


def test_without_user_namespaces_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which
    # Not pytest's folder, which is closed to the sandbox's user.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        refusing = Path(folder, "bwrap")
        refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create' >&2\nexit 1\n")
        refusing.chmod(0o755)
        monkeypatch.setattr(
            shutil, "which", lambda name: str(refusing) if name == "bwrap" else real(name)
        )
        with pytest.raises(InputError, match=r"No permissions to create.*never run without"):
            find_sandbox.__wrapped__()
        refusing.chmod(0o600)
        with pytest.raises(InputError, match=r"Permission denied.*never run without"):
            find_sandbox.__wrapped__()


@pytest.mark.parametrize("name", ["bwrap", "prlimit"])
def test_a_missing_program_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda other: None if other == name else real(other))
    with pytest.raises(InputError, match=rf"{name} is not installed.*setup_sandbox.sh"):
        find_sandbox.__wrapped__()


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(InputError, match="x86_64 and aarch64"):
        find_sandbox.__wrapped__()


def test_a_sandbox_that_dies_is_no_verdict() -> None:
    """A broken sandbox must not look like a wrong answer."""
    sandbox = find_sandbox()
    assert isinstance(sandbox, Bubblewrap)
    broken = dataclasses.replace(sandbox, python=Path("/nonexistent"))
    with pytest.raises(WorkError, match="did not start"):
        broken.run("print(1)")
