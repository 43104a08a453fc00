"""The sandbox of Apptainer, against a stand-in that confines by bubblewrap.

No real Apptainer was at hand. `fake_apptainer` knows its flags and refuses others; limits,
deadlines, exit codes and the filter of system calls are the real ones.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import os
import re
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.rlvr.rewards import apptainer, sandbox, watch
from mellum2_megatron.rlvr.rewards.apptainer import IMAGE_VARIABLE, Apptainer
from mellum2_megatron.rlvr.rewards.sandbox import CHOICE_VARIABLE, Limits, find_sandbox
from tests import REPOSITORY
from tests.rlvr.attacked import TIGHT, Attacked
from tests.rlvr.hostile_programs import CHEATS, ESCAPED, ESCAPES, EXHAUSTING
from tests.sandbox import needs_sandbox

pytestmark = [needs_sandbox, pytest.mark.slow]

STAND_IN = REPOSITORY / "tests/rlvr/fake_apptainer.py"
ALLOW = bytes.fromhex("0600000000" + "00ff7f")  # BPF_RET, SECCOMP_RET_ALLOW
REFUSING = "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"
ESCAPES_HERE = (
    "secret_file secret_by_symlink secret_by_proc_root home environment write_program write_usr "
    "write_input loopback internet abstract_socket setuid_root new_user_namespace "
    "clone_user_namespace clone_process_namespace mount ptrace_parent read_other_memory "
    "write_first_process hide_from_the_watch signal_others raise_limits shared_memory memory_file "
    "keyring io_uring host_of_a_virtual_machine large_socket_buffer host_name terminal "
    "signals_of_the_user watches_of_the_user huge_page_in_a_pipe files_in_a_socket memory_of_tcp "
    "core_of_memory real_time"
).split()
EXHAUSTING_HERE = {
    name: EXHAUSTING[name][1]
    for name in (
        "endless memory memory_of_many large_file many_files open_files output stop_itself "
        "kill_all outlives"
    ).split()
} | {
    # The watch looks every 50 ms; on a busy machine the kernel's limit, thousands of processes
    # higher, may come first. Then each of them ends with an error.
    "fork_bomb": "limit of (processes|memory)|exit code 1 .*main.py",
    "full_disk": "limit of disk|No space left",
}
CHEATS_HERE = (
    "prints_passed leaves_at_once leaves_in_the_call reads_the_harness says_both_results "
    "right_then_killed thread_prints_later closes_the_pipe"
).split()


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder with the stand-in and an image. Not pytest's, which is closed to other users."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_program(folder / "apptainer", STAND_IN.read_text())
        (folder / "image").mkdir()
        yield folder


def write_program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has Apptainer and forbids user namespaces; return its folder."""
    forbid = place / "forbid"
    forbid.mkdir(exist_ok=True)
    write_program(forbid / "bwrap", REFUSING)
    monkeypatch.setenv("PATH", f"{forbid}:{place}:{os.environ['PATH']}")
    monkeypatch.setenv(IMAGE_VARIABLE, str(place / "image"))
    monkeypatch.delenv(CHOICE_VARIABLE, raising=False)
    return place


@pytest.fixture(scope="module")
def attacked(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    find_sandbox.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{place}:{os.environ['PATH']}")
        patch.setenv(IMAGE_VARIABLE, str(place / "image"))
        patch.setenv(CHOICE_VARIABLE, "apptainer")
        names = {*ESCAPES_HERE, *EXHAUSTING_HERE, *CHEATS_HERE}
        result = Attacked(tmp_path_factory.mktemp("user"), names)
        yield result
        result.close()
    find_sandbox.cache_clear()


@pytest.mark.parametrize("name", ESCAPES_HERE)
def test_nothing_gets_out(name: str, attacked: Attacked) -> None:
    assert name in ESCAPES
    outcome = attacked.runs[name].result()
    assert outcome.stopped is None
    assert outcome.output.strip(), "the attempt was not made"
    assert ESCAPED.encode() not in outcome.output


@pytest.mark.parametrize("name", EXHAUSTING_HERE)
def test_limits_hold(name: str, attacked: Attacked) -> None:
    outcome = attacked.runs[name].result()
    assert re.search(EXHAUSTING_HERE[name], outcome.reason + outcome.message), outcome.reason
    assert len(outcome.output) <= TIGHT.output_bytes


@pytest.mark.parametrize("name", CHEATS_HERE)
def test_nobody_wins_by_a_lie(name: str, attacked: Attacked) -> None:
    assert name in CHEATS
    verdict = attacked.verdicts[name].result()
    assert verdict.reward == 0
    assert verdict.reason


def test_nothing_is_left(attacked: Attacked, place: Path) -> None:
    attacked.pool.shutdown()
    assert not list(Path(tempfile.gettempdir()).glob("mellum2-program-*"))
    commands = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline")]
    # The first process of each namespace, with which all of them end.
    assert not [line for line in commands if bytes(place) in line]


# -- The choice ------------------------------------------------------------------------------------


def test_apptainer_runs_programs_where_user_namespaces_are_forbidden(
    installed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = find_sandbox.__wrapped__()
    assert found.description == f"apptainer with {installed / 'image'}"
    assert "No permissions to create new namespace" in caplog.text
    assert f"programs run in {found.description}" in caplog.text
    outcome = found.run("import sys\nprint(input())\nsys.exit(3)", stdin=b"hello\n")
    assert (outcome.output, outcome.exit_code, outcome.stopped) == (b"hello\n", 3, None)


def test_bubblewrap_comes_first_where_it_works(
    installed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (installed / "forbid/bwrap").unlink()
    with caplog.at_level(logging.WARNING):
        assert find_sandbox.__wrapped__().description == "bubblewrap"
    assert not caplog.records
    monkeypatch.setenv(CHOICE_VARIABLE, "apptainer")
    assert find_sandbox.__wrapped__().description.startswith("apptainer with")


def test_a_named_sandbox_has_no_second(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE_VARIABLE, "bubblewrap")
    with pytest.raises(InputError, match="No permissions to create"):
        find_sandbox.__wrapped__()
    monkeypatch.setenv(CHOICE_VARIABLE, "docker")
    with pytest.raises(InputError, match=r"MELLUM2_SANDBOX='?docker.*bubblewrap or apptainer"):
        find_sandbox.__wrapped__()


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ("", "MELLUM2_SANDBOX_IMAGE is not set"),
        ("image.sif", "image.sif.*absolute path"),
        ("/nowhere/image.sif", "/nowhere/image.sif.*can be read"),
        ("docker://python", "docker://python.*absolute path"),
        ("/usr/..", "MELLUM2_SANDBOX_IMAGE=/.*all of this machine"),
    ],
)
def test_an_image_that_cannot_be_used(
    image: str, why: str, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(IMAGE_VARIABLE, image)
    with pytest.raises(InputError, match=why) as caught:
        find_sandbox.__wrapped__()
    # One message has both: somebody may rather allow user namespaces.
    assert "No permissions to create new namespace" in str(caught.value)
    assert "user.max_user_namespaces" in caught.value.fix


def test_singularity_will_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IMAGE_VARIABLE, str(place / "image"))
    real = shutil.which
    names = {"apptainer": None, "singularity": "/opt/bin/singularity"}
    monkeypatch.setattr(shutil, "which", lambda name: names.get(name, real(name)))
    found = Apptainer.find()
    assert found.program == "/opt/bin/singularity"
    assert "SINGULARITY_NO_NV" in apptainer._environment(found.program)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="apptainer is not installed"):
        Apptainer.find()


def test_a_temporary_folder_that_no_bind_can_name(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a:b"
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    with pytest.raises(InputError, match=r"TMPDIR=.*a:b.*colon or comma"):
        Apptainer.find()


# -- The command -----------------------------------------------------------------------------------


def test_the_command(place: Path) -> None:
    """Word for word as action_flags.go names the flags; nothing that opens the container."""
    made = Apptainer("/usr/bin/apptainer", Path("/images/python.sif"), b"")
    assert made.command("/tmp/folder") == [
        "/usr/bin/apptainer",
        "--quiet",
        "exec",
        "--containall",
        "--no-home",
        "--no-mount",
        "sys,devpts,hostfs,home,cwd",
        "--net",
        "--network",
        "none",
        "--uts",
        "--hostname",
        "sandbox",
        "--no-privs",
        "--drop-caps",
        "all",
        "--bind",
        "/tmp/folder:/program:ro",
        "/images/python.sif",
    ]


def test_no_variable_of_the_caller_reaches_apptainer(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPTAINER_BIND", "/home")
    (installed / "says").mkdir()
    write_program(installed / "says/apptainer", "#!/bin/sh\nenv | tr '\\n' ' ' >&2\nexit 255\n")
    made = dataclasses.replace(Apptainer.find(), program=str(installed / "says/apptainer"))
    with pytest.raises(WorkError) as caught:
        made.run("print(1)")
    said = set(re.findall(r"(\w+)=", caught.value.what))
    assert said - {"PWD", "SHLVL", "_"} == {"PATH", "APPTAINER_NO_NV", "APPTAINER_NO_ROCM"}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--net", "--network", "none"), "it has a network"),
        (("--containall",), "it sees other processes"),
    ],
    ids=["network", "containall"],
)
def test_a_container_that_is_no_sandbox_is_refused(
    words: tuple[str, ...], why: str, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where apptainer.conf switches off what a flag asks for."""
    whole = Apptainer.command
    monkeypatch.setattr(
        Apptainer,
        "command",
        lambda self, folder: [word for word in whole(self, folder) if word not in words],
    )
    with pytest.raises(InputError, match=f"is no sandbox: .*{why}"):
        find_sandbox.__wrapped__()
    assert not Path("/tmp/fill").exists()


def test_binds_of_the_administrator_are_seen(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = installed / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.chdir(shared)
    whole = Apptainer.command

    def with_binds(self: Apptainer, folder: str) -> list[str]:
        *words, image = whole(self, folder)
        words = [word.removesuffix(":ro") for word in words]
        return [*words, "--bind", f"{shared}:{shared}", image]

    monkeypatch.setattr(Apptainer, "command", with_binds)
    with pytest.raises(InputError) as caught:
        find_sandbox.__wrapped__()
    said = caught.value.value
    assert f"it sees the caller's files ({shared})" in said
    assert re.search(re.escape(str(shared)) + r" \(\w+\) can be written to", said)
    assert "its program can be changed" in said


def test_an_empty_filter_is_noticed(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apptainer, "syscall_filter", lambda _: ALLOW)
    with pytest.raises(InputError, match="is no sandbox: system calls are not filtered"):
        find_sandbox.__wrapped__()


def test_a_watch_that_sees_nothing_is_noticed(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_children", lambda _: [])
    monkeypatch.setattr(sandbox, "_SLEEP_S", 1.0)
    with pytest.raises(InputError, match="the watch cannot see its files"):
        find_sandbox.__wrapped__()


# -- Faults ----------------------------------------------------------------------------------------

FAULTS = {
    "error": ("echo 'FATAL:   setuid workflow disabled' >&2; exit 255", "setuid workflow disabled"),
    "silent": ("exit 0", "did not start: it was killed"),
    "signal": ("kill -9 $$", "did not start: it was killed"),
    "hang": ("echo waiting >&2; sleep 86411", "nothing for 1 s; waiting"),
    "talks": ("while :; do echo '0123456789abcdef'; done", "did not start"),
    "no python": ("exec /nonexistent/python3", "not found"),
    "no ctypes": ("printf 'Traceback\\nNo module _ctypes' >&2; exit 1", "start: No module _ctypes"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_apptainer_that_does_not_start_is_no_verdict(
    name: str, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "START_S", 1.0)
    body, why = FAULTS[name]
    write_program(installed / "broken", f"#!/bin/sh\n{body}\n")
    broken = dataclasses.replace(Apptainer.find(), program=str(installed / "broken"))
    with pytest.raises(WorkError, match=why):
        broken.run("print(1)", limits=Limits(seconds=30.0))


def test_an_apptainer_that_is_killed_is_no_verdict(installed: Path) -> None:
    body = f'{installed}/apptainer "$@"\nkill -9 $$'
    write_program(installed / "killed", f"#!/bin/sh\n{body}\n")
    killed = dataclasses.replace(Apptainer.find(), program=str(installed / "killed"))
    with pytest.raises(WorkError, match="did not start"):
        killed.run("print(1)")


def test_a_program_cannot_look_like_an_apptainer_that_failed(installed: Path) -> None:
    outcome = Apptainer.find().run(
        "import os, sys\nsys.stderr.write('FATAL:   could not open image\\n')\n"
        "sys.stderr.flush()\nos._exit(255)"
    )
    assert (outcome.exit_code, outcome.reason.split(" (")[0]) == (255, "exit code 255")


def test_a_program_begins_when_its_mark_is_read(tmp_path: Path) -> None:
    """One that took the mark out of the pipe would look like an Apptainer that did not start."""
    program, begun = tmp_path / "main.py", tmp_path / "begun"
    program.write_text(f"open({str(begun)!r}, 'w').close()\nprint('end')")
    job = {"limits": {}, "filter": ALLOW.hex(), "mark": b"mark".hex(), "program": str(program)}
    script = Path(apptainer.__file__).with_name("confine_script.py").read_text()
    words = [sys.executable, "-I", "-S", "-B", "-c", script, json.dumps(job | {"environment": {}})]
    with subprocess.Popen(words, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        select.select([process.stdout], [], [])
        time.sleep(0.3)
        assert not begun.exists()
        assert process.stdout.read(4) == b"mark"
        assert process.stdout.read(4) == b"end\n"
    assert begun.exists()


def test_a_slow_start_takes_no_time_from_the_program(installed: Path) -> None:
    write_program(installed / "slow", f'#!/bin/sh\nsleep 2.5\nexec {installed}/apptainer "$@"\n')
    slow = dataclasses.replace(Apptainer.find(), program=str(installed / "slow"))
    outcome = slow.run("print(1)", limits=Limits(seconds=2.0))
    assert (outcome.output, outcome.reason) == (b"1\n", "")
    begun = time.monotonic()
    outcome = slow.run("import time\ntime.sleep(60)", limits=Limits(seconds=2.0))
    assert outcome.reason == "limit of time"
    assert time.monotonic() - begun > 4


def test_memory_of_dev_shm_counts_as_disk(installed: Path) -> None:
    """Apptainer's has no size of its own."""
    program = "open('/dev/shm/x', 'wb').write(b'x' * (5 << 20))\nimport time\ntime.sleep(60)"
    limits = dataclasses.replace(TIGHT, seconds=60.0, disk_bytes=4 << 20)
    assert Apptainer.find().run(program, limits=limits).reason == "limit of disk"


@pytest.mark.skipif(os.geteuid() != 0, reason="starts a process of another user")
def test_threads_of_the_user_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apptainer, "NOBODY", 54_321)
    before = apptainer._threads_of_user()
    with subprocess.Popen(["/bin/sleep", "60"], user=54_321, group=54_321) as process:
        assert apptainer._threads_of_user() == before + 1
        process.kill()


def test_threads_count_as_processes(installed: Path) -> None:
    program = (
        "import threading, time\nthreading.stack_size(1 << 16)\nfor _ in range(30):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()"
    )
    limits = dataclasses.replace(TIGHT, seconds=60.0)
    assert Apptainer.find().run(program, limits=limits).reason == "limit of processes"


def test_ten_programs_do_not_share_a_limit(installed: Path) -> None:
    program = "import os, time\nif os.fork():\n    os.wait()\nelse:\n    time.sleep(0.5)"
    made = Apptainer.find()
    with ThreadPoolExecutor(10) as pool:
        runs = [pool.submit(made.run, program, limits=Limits(processes=2)) for _ in range(10)]
    assert [run.result().reason for run in runs] == [""] * 10


def test_the_program_lies_where_only_its_user_can_read_it(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = {}

    def note(command: list[str], **_: object) -> None:
        folder = Path(command[command.index("--bind") + 1].partition(":")[0])
        modes[folder] = stat.S_IMODE(folder.stat().st_mode)
        modes[folder / "main.py"] = stat.S_IMODE((folder / "main.py").stat().st_mode)
        raise OSError("noted")

    monkeypatch.setattr(apptainer, "start_process", note)
    with pytest.raises(WorkError, match="noted"):
        Apptainer.find().run("print(1)")
    assert sorted(modes.values()) == [0o444, 0o755 if os.geteuid() == 0 else 0o700]
    assert not any(file.exists() for file in modes)


@pytest.mark.parametrize("name", ["confine_script", "probe_script"])
def test_scripts_run_on_the_python_of_an_older_image(name: str) -> None:
    text = (REPOSITORY / f"mellum2_megatron/rlvr/rewards/{name}.py").read_text()
    ast.parse(text, feature_version=(3, 8))
