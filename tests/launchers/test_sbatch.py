"""The batch script: its bytes, its quoting, and its reaction to each end of its step.

Stand-ins take the place of Slurm's commands and record their calls; tests/slurm has the real ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.job import ClusterJob
from launchers.profile import Container, Mount
from launchers.profile_text import SCRIPT_VARIABLES
from launchers.sbatch import render
from tests.launchers.golden_jobs import GOLDEN, golden_jobs

JOBS = golden_jobs()

# Records its arguments and variables, and exits with the code in the file NAME.code, default 0.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys, time
folder = pathlib.Path(os.environ["STAND_IN"])
name = pathlib.Path(sys.argv[0]).name
told = []
if name == "srun":
    import signal
    signal.signal(signal.SIGUSR1, lambda number, _: told.append(number))
    (folder / "srun.started").write_text("")
    end = time.monotonic() + 60
    while (folder / "srun.waits").exists() and not told and time.monotonic() < end:
        time.sleep(0.02)
with (folder / "calls").open("a") as file:
    file.write(json.dumps([[name, *sys.argv[1:]], dict(os.environ), len(told)]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    print("gpu-1\\ngpu-2")
elif "node" in sys.argv:
    print("NodeName=gpu-1 NodeAddr=10.0.0.1 NodeHostName=gpu-1")
elif name == "sbatch":
    print("99;cluster")
elif name == "squeue":
    print("55 afterok:42(unfulfilled),afterany:7(unfulfilled)\\n56 afterok:421(unfulfilled)")
code = folder / (f"{{name}}.{{sys.argv[1]}}.code" if name == "scontrol" else f"{{name}}.code")
sys.exit(int(code.read_text()) if code.exists() else 0)
"""


class Stage:
    """A folder with stand-ins for Slurm and for the interpreter (`python`) to run a script in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for name in ("srun", "scontrol", "sbatch", "squeue", "apptainer", "enroot", "python"):
            (self.bin / name).write_text(STAND_IN)
            (self.bin / name).chmod(0o755)

    def start(self, job: ClusterJob, **environment: str) -> subprocess.Popen[str]:
        """Start the job's script with Slurm's variables."""
        if job.profile.container is None:
            job = dataclasses.replace(
                job, profile=dataclasses.replace(job.profile, python=str(self.bin / "python"))
            )
        job = dataclasses.replace(
            job, profile=dataclasses.replace(job.profile, modules=(), setup=())
        )
        (self.folder / "script").write_text(render(job))
        variables = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "STAND_IN": str(self.folder),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "gpu-[1-2]",
            **environment,
        }
        return subprocess.Popen(
            ["bash", str(self.folder / "script")],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, job: ClusterJob, **environment: str) -> int:
        """Run the job's script to its end; return its exit code."""
        process = self.start(job, **environment)
        self.output = process.communicate(timeout=60)[0]
        return process.returncode

    def ends(self, **codes: int) -> None:
        """Set exit codes of stand-ins; ``scontrol_requeue`` is for ``scontrol requeue``."""
        for name, code in codes.items():
            (self.folder / f"{name.replace('_', '.')}.code").write_text(str(code))

    def calls(self, name: str) -> list[list[str]]:
        """Return the arguments of each call of a stand-in."""
        return [words[1:] for words, _, _ in self.lines() if words[0] == name]

    def lines(self) -> list[tuple[list[str], dict[str, str], int]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.mark.parametrize("name", sorted(JOBS))
def test_script_equals_its_golden_file(name: str):
    assert render(JOBS[name]) == (GOLDEN / f"{name}.sbatch").read_text(), (
        "a script has changed; if that was meant: python -m tests.launchers.golden_jobs"
    )


def test_no_golden_is_left_over():
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.sbatch" for name in JOBS}


@pytest.mark.parametrize("name", sorted(JOBS))
def test_bash_finds_nothing(name: str):
    subprocess.run(["bash", "-n", str(GOLDEN / f"{name}.sbatch")], check=True)


@pytest.mark.slurm
def test_shellcheck_finds_nothing():
    """Part of `make test-launch`, whose set-up installs shellcheck."""
    if shutil.which("shellcheck") is None and os.environ.get("MELLUM2_REQUIRE_SLURM") != "1":
        pytest.skip("shellcheck is not installed: scripts/setup_slurm.sh installs it")
    subprocess.run(["shellcheck", *sorted(GOLDEN.glob("*.sbatch"))], check=True)


@pytest.mark.parametrize("name", ["bare", "pyxis", "apptainer", "enroot"])
def test_secrets_are_not_in_the_script(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    assert "hunter2" not in render(JOBS[name])


NASTY = [
    "a b",
    "it's",
    'say "hi"',
    "$HOME",
    "`date`",
    "100%",
    "semi;colon",
    "*",
    "(x)",
    "a#b",
    "ä",
    "-n",
    "~",
    "\\n",
    "a,b",
]
NASTY_NAME = "".join(NASTY).replace("\\", "").replace(",", "")


def test_every_word_arrives_as_it_was(stage: Stage):
    folder = Path("/runs") / NASTY_NAME
    job = JOBS["bare"]
    variables = {f"GIVEN_{number}": text for number, text in enumerate(NASTY)}
    profile = dataclasses.replace(
        job.profile, variables=variables, srun=tuple(f"--x={text}" for text in NASTY)
    )
    assert (
        stage.run(dataclasses.replace(job, folder=folder, code=folder / "code", profile=profile))
        == 0
    )
    words, environment, _ = next(line for line in stage.lines() if line[0][0] == "srun")
    assert [word for word in words if word.startswith("--x=")] == [f"--x={text}" for text in NASTY]
    assert f"--output={str(folder).replace('%', '%%')}/logs/%x-%j-node%n.log" in words
    assert f"{folder}/run.yaml" in words
    assert {name: environment[name] for name in variables} == variables
    assert environment["PYTHONPATH"] == f"{folder}/code"


def sbatch_words(line: str) -> list[str]:
    """Words of an ``#SBATCH`` line by sbatch's own rules (src/sbatch/opt.c, Slurm 23.11).

    A backslash escapes the next character anywhere, quotes of both kinds group, and an unquoted #
    begins a comment.
    """
    words, word, quote, position = [], "", "", 0
    started = False
    while position < len(line):
        letter = line[position]
        if letter == "\\":
            position += 1
            word, started = word + line[position : position + 1], True
        elif quote:
            if letter == quote:
                quote = ""
            else:
                word += letter
        elif letter in "'\"":
            quote, started = letter, True
        elif letter == "#":
            break
        elif letter.isspace():
            if started:
                words.append(word)
            word, started = "", False
        else:
            word, started = word + letter, True
        position += 1
    assert not quote, "an unclosed quote is an error of sbatch"
    return [*words, word] if started else words


def directives(script: str) -> dict[str, str]:
    """Flags of a script with their values as sbatch reads them."""
    flags: dict[str, str] = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            for word in sbatch_words(line.removeprefix("#SBATCH")):
                flag, _, value = word.partition("=")
                assert flag not in flags
                flags[flag] = value
        elif line and not line.startswith("#"):
            break
    return flags


@pytest.mark.parametrize(
    "text", [*NASTY, "a\\", "\\", '"', "#", " # x", "a\tb".replace("\t", " "), "%j"]
)
def test_directives_are_read_back_as_they_were(text: str):
    job = JOBS["bare"]
    profile = dataclasses.replace(
        job.profile, account=text, partition=text, qos=text, sbatch={"comment": text, "wckey": "w"}
    )
    flags = directives(render(dataclasses.replace(job, profile=profile)))
    for flag in ("--account", "--partition", "--qos", "--comment"):
        assert flags[flag] == text
    assert flags["--wckey"] == "w"
    assert flags["--output"] == "/lustre/runs/my tiny run/logs/%x-%j.log"


def test_a_profile_cannot_set_a_variable_of_the_script():
    for job in JOBS.values():
        script = render(job)
        # The site's own lines and variables are the profile's.
        assigned = set(re.findall(r"(?m)^\s*(?:export )?([A-Za-z_]\w*)\+?=", script))
        assigned |= set(re.findall(r"(?m)^\s*for ([a-z]+) in", script))
        assigned |= set(*re.findall(r"read -r ([a-z]+) ([a-z]+)", script))
        ours = assigned - {"", "PYTHONPATH", *job.profile.variables}
        assert ours - {"NCCL_DEBUG"} <= SCRIPT_VARIABLES, ours - SCRIPT_VARIABLES
        assert {"folder", "step", "MASTER_PORT", "waiting"} & ours


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer", "enroot"])
def test_container_words_arrive_as_they_were(runtime: str, stage: Stage):
    container = Container(
        image=f"/images/{NASTY_NAME}.sif",
        runtime=runtime,  # type: ignore[arg-type]
        mounts=(Mount(source=f"/{NASTY_NAME}", target="/in", read_only=True),),
        arguments=tuple(f"--x={text}" for text in NASTY),
    )
    job = JOBS[runtime]
    profile = dataclasses.replace(job.profile, container=container, variables={"GIVEN": NASTY_NAME})
    assert (
        stage.run(dataclasses.replace(job, profile=profile), WANDB_API_KEY=f"secret {NASTY_NAME}")
        == 0
    )
    words, environment, _ = next(line for line in stage.lines() if line[0][0] == "srun")
    assert [word for word in words if word.startswith("--x=")] == [f"--x={text}" for text in NASTY]
    names = "MASTER_ADDR MASTER_PORT MELLUM2_SERIES PYTHONPATH GIVEN WANDB_API_KEY".split()
    if runtime == "pyxis":
        assert f"--container-image=/images/{NASTY_NAME}.sif" in words
        assert f"--container-mounts=/{NASTY_NAME}:/in:ro" in words
        assert f"--container-env={','.join(names)},HF_TOKEN" in words
    elif runtime == "apptainer":
        assert words[words.index("--bind") + 1] == f"/{NASTY_NAME}:/in:ro"
        assert f"/images/{NASTY_NAME}.sif" in words
        assert environment["APPTAINERENV_GIVEN"] == NASTY_NAME
        assert environment["APPTAINERENV_WANDB_API_KEY"] == f"secret {NASTY_NAME}"
        assert "APPTAINERENV_HF_TOKEN" not in environment  # not set where the job was submitted
    else:
        assert words[words.index("--mount") + 1] == f"/{NASTY_NAME}:/in:none:x-create=auto,rbind,ro"
        given = [after for word, after in itertools.pairwise(words) if word == "--env"]
        assert given == ["SLURM_JOB_ID", *names]
        assert f"/images/{NASTY_NAME}.sif" in words


def test_the_meeting_place(stage: Stage):
    ports = set()
    for _ in range(4):  # of the same job
        assert stage.run(JOBS["bare"]) == 0
        environment = stage.lines()[-1][1]
        assert environment["MASTER_ADDR"] == "10.0.0.1"
        ports.add(environment["MASTER_PORT"])
    assert len(ports) > 1  # by chance alone; all four are equal once in 8e12 runs
    assert all(10000 <= int(port) < 30000 for port in ports)


def test_success(stage: Stage):
    assert stage.run(JOBS["bare"]) == 0
    assert not stage.calls("python")
    assert [words[0] for words in stage.calls("scontrol")] == ["show", "--oneliner"]


@pytest.mark.parametrize(("outcome", "code"), [(1, 1), (2, 2)])
def test_a_stop_for_good(outcome: int, code: int, stage: Stage):
    stage.ends(srun=1, python=outcome)
    assert stage.run(JOBS["bare"]) == code
    assert stage.calls("python") == [
        [
            "-m",
            "launchers.outcome",
            "/lustre/runs/my tiny run",
            "--tries",
            "3",
            "--code",
            "1",
            "--told",
            "",
        ]
    ]
    assert not stage.calls("sbatch")
    assert not any(words[0] == "requeue" for words in stage.calls("scontrol"))


def test_starting_again(stage: Stage):
    stage.ends(srun=75)
    assert stage.run(JOBS["bare"]) == 75
    assert stage.calls("scontrol")[-1] == ["requeue", "42"]
    assert not stage.calls("sbatch")


def test_starting_a_task_of_an_array_again(stage: Stage):
    stage.ends(srun=75)
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}
    assert stage.run(JOBS["array"], **array) == 75
    assert stage.calls("scontrol")[-1] == ["requeue", "40_2"]
    assert "/lustre/runs/my tiny run/2/run.yaml" in stage.calls("srun")[0]
    stage.ends(scontrol_requeue=1)
    assert stage.run(JOBS["array"], **array) == 75
    assert stage.calls("sbatch") == [
        ["--parsable", "--dependency=afterany:42", "--array=2", str(stage.folder / "script")]
    ]


def test_a_continuation_where_requeueing_is_not_allowed(stage: Stage):
    stage.ends(srun=75, scontrol_requeue=1)
    assert stage.run(JOBS["bare"], SLURM_RESTART_COUNT="3") == 75
    words, environment, _ = next(line for line in stage.lines() if line[0][0] == "sbatch")
    assert words[1:] == ["--parsable", "--dependency=afterany:42", str(stage.folder / "script")]
    assert environment["MELLUM2_SERIES"] == "42"
    assert "SLURM_RESTART_COUNT" not in environment
    # A job that waited for this one waits for the continuation, and for its other conditions.
    updates = [words for words in stage.calls("scontrol") if words[0] == "update"]
    assert updates == [["update", "jobid=55", "dependency=afterok:99,afterany:7"]]
    assert "job 99 continues job 42" in stage.output
    stage.ends(sbatch=1)
    assert stage.run(JOBS["bare"]) == 1


@pytest.mark.parametrize(("number", "told"), [(signal.SIGUSR1, "USR1"), (signal.SIGTERM, "TERM")])
def test_signals_reach_the_ranks_and_the_step_is_awaited(number: int, told: str, stage: Stage):
    stage.ends(srun=75)
    (stage.folder / "srun.waits").write_text("")
    process = stage.start(JOBS["bare"])
    until = time.monotonic() + 30
    while not (stage.folder / "srun.started").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert next(line for line in stage.lines() if line[0][0] == "srun")[2] == 1
    assert stage.calls("python")[0][-4:] == ["--code", "75", "--told", told]
    requeued = any(words[0] == "requeue" for words in stage.calls("scontrol"))
    assert requeued == (
        told == "USR1"
    )  # what Slurm ends itself it also requeues itself, or was cancelled
