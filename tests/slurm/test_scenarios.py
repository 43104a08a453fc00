"""Events of a job on a real Slurm: end, time limit, preemption, killed rank, failure, lost node.

Jobs of several tests train side by side. A job with an event is held before a step
(`faults/sitecustomize.py`) until its test has come; the test then checks what the job leaves.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from launchers.batch_job import write_job
from launchers.job import ClusterJob
from launchers.outcome import read_attempts
from launchers.profile import Profile
from mellum2_megatron.checkpoint.folder import tracked_iteration
from mellum2_megatron.config import Run, to_yaml
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.metrics.log import METRICS_FILE, read_metrics
from tests.launchers.jobs import make_job
from tests.slurm.cluster import Cluster, wait_for
from tests.training.test_train import STEPS, small_corpus, small_run

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(2000),
]

FAULTS = Path(__file__).parent / "faults"
LONG = 900.0
"""Time limit of a wait, seconds; no wait takes as long on any machine."""

ENDED_BADLY = ("FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")

PROFILE = Profile(
    name="test",
    account="none",
    time="30",
    nodes=2,
    cpus_per_task=1,
    variables={"OMP_NUM_THREADS": "1"},
    grace_seconds=60,
    tries=1,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """A submitted job and its number."""

    job: ClusterJob
    number: str
    slurm: Cluster

    @property
    def folder(self) -> Path:
        return self.job.folder

    def state(self) -> str:
        """Return Slurm's state: PENDING, RUNNING, COMPLETED, FAILED .."""
        return self.show("JobState")

    def show(self, key: str) -> str:
        """Return a value of ``scontrol show job``."""
        output = self.slurm.run("scontrol", "--oneliner", "show", "job", self.number)
        return next(word.partition("=")[2] for word in output.split() if word.startswith(f"{key}="))

    def wait(self, *states: str) -> None:
        """Wait until the job is in one of these states."""
        wait_for(lambda: self.state() in states, LONG, f"job {self.number} {states}", self.log)

    def arrived(self) -> list[int]:
        """Wait until the gate holds both ranks; return their process ids."""
        files = [self.folder / f"arrived.{rank}" for rank in range(2)]
        wait_for(
            lambda: all(file.is_file() and file.read_text() for file in files),
            LONG,
            "at the gate",
            self.log,
        )
        return [int(file.read_text()) for file in files]

    def open_gate(self) -> None:
        """Let the held ranks continue."""
        (self.folder / "gate").unlink()

    def log(self) -> str:
        """Return the logs of the job and of the daemons."""
        logs = [
            f"--- {path.name} ---\n{path.read_text()}"
            for path in sorted((self.job.folder / "logs").glob("*.log"))
        ]
        return "\n".join([*logs, self.slurm.run("squeue"), self.slurm.log()])

    def kinds(self) -> list[str | None]:
        """Return the kinds of its attempts' ends."""
        return [attempt.kind for attempt in read_attempts(self.folder)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_corpus(tmp_path_factory.mktemp("slurm data"))


class Jobs:
    """Jobs of the selected tests in their order, submitted `AHEAD` tests before they are used."""

    AHEAD = 2

    def __init__(
        self, slurm: Cluster, corpus: PreparedData, folder: Path, wanted: set[str]
    ) -> None:
        self.slurm, self.corpus, self.folder = slurm, corpus, folder
        self._names = [name for name in SCENARIOS if name in wanted or name == "success"]
        self._submitted: dict[str, Submitted] = {}

    def __getitem__(self, name: str) -> Submitted:
        for scenario in self._names[: self._names.index(name) + 1 + self.AHEAD]:
            if scenario not in self._submitted:
                self._submitted[scenario] = self._submit(scenario, **SCENARIOS[scenario])
        return self._submitted[name]

    def run(self, name: str, *overrides: str) -> Run:
        """Return a run of six steps that saves after every second one."""
        # No hang watch: the gate may hold a rank for as long as the tests before take.
        more = [
            "logging.tensorboard=false",
            "checkpoint.save_interval=2",
            "timeout_minutes=600",
            *overrides,
        ]
        return small_run(self.corpus, self.folder / name, *more)

    def _submit(
        self,
        name: str,
        folder: str = "",
        flags: tuple[str, ...] = (),
        gate: str = "",
        file: str = "",
        **more: Any,
    ) -> Submitted:
        job = make_job(self.run(folder or name), PROFILE, name=name, code=FAULTS, **more)
        script = write_job(job)
        if gate:
            (job.folder / "gate").write_text(gate)
        if file:
            (job.folder / "run.yaml").write_text(to_yaml(self.run(name, file)))
        number = self.slurm.run("sbatch", "--parsable", *flags, str(script)).strip()
        return Submitted(job=job, number=number, slurm=self.slurm)


SCENARIOS: dict[str, dict[str, Any]] = {
    # sbatch, bash and Slurm's log patterns all read this name by rules of their own.
    "success": {"folder": """it's a "run", 100% #1 $HOME"""},
    "time_limit": {"gate": "4 hold", "time": "2"},
    "preemption": {"gate": "4 hold", "flags": ("--partition=spare", "--gres=seat:1")},
    "killed_rank": {"gate": "4 hold"},
    "cancel": {"gate": "4 hold"},
    "repeated_failure": {"gate": "4 fail"},
    "bad_input": {"file": "data.path=/nowhere"},
    "array": {"sweep": [[], ["seed=4321"]]},
    "chain": {"gate": "4 hold", "flags": ("--no-requeue",)},
    "lost_node": {"gate": "4 hold"},
}
"""Test -> options of its job. A gate with ``hold`` keeps the ranks waiting for the test."""


@pytest.fixture(scope="session")
def jobs(
    slurm: Cluster,
    corpus: PreparedData,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Jobs:
    wanted = {
        item.name.removeprefix("test_")
        for item in request.session.items
        if item.path == Path(__file__)
    }
    return Jobs(slurm, corpus, tmp_path_factory.mktemp("slurm runs"), wanted)


def losses(folder: Path) -> dict[int, tuple[float, ...]]:
    """Return losses, gradient norm and learning rate by step; they must not change."""
    names = ("lm_loss", "mtp_loss", "grad_norm", "learning_rate")
    records = [record for record in read_metrics(folder / METRICS_FILE) if record.kind == "train"]
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    return {record.step: tuple(record.values[name] for name in names) for record in records}


def check_resumed(job: Submitted, undisturbed: Submitted, kinds: list[str]) -> None:
    """Wait for an interrupted job and compare it with an undisturbed one."""
    job.wait("COMPLETED", *ENDED_BADLY)
    assert job.state() == "COMPLETED", job.log()
    assert job.kinds() == kinds, job.log()
    undisturbed.wait("COMPLETED", *ENDED_BADLY)
    assert losses(job.folder) == losses(undisturbed.folder)


def test_success(jobs: Jobs):
    job = jobs["success"]
    job.wait("COMPLETED", *ENDED_BADLY)
    assert job.state() == "COMPLETED", job.log()
    assert tracked_iteration(job.folder) == STEPS
    assert job.kinds() == ["done"]
    assert len(losses(job.folder)) == STEPS
    assert (
        f"step {STEPS}/{STEPS}"
        in (job.folder / "logs" / f"success-{job.number}-node1.log").read_text()
    )


def test_time_limit(jobs: Jobs, slurm: Cluster):
    """Before the limit SIGUSR1 comes: the run saves, the job is requeued and the run resumes."""
    job = jobs["time_limit"]
    wait_for(lambda: job.kinds()[:1] == ["stopped"], LONG, "told to stop", job.log)
    # A busy machine may need longer for the rest.
    slurm.run("scontrol", "update", f"jobid={job.number}", "TimeLimit=30")
    job.open_gate()
    job.wait("COMPLETED", *ENDED_BADLY)
    kinds = job.kinds()
    check_resumed(job, jobs["success"], [*["stopped"] * (len(kinds) - 1), "done"])
    assert len(kinds) > 1


def test_preemption(jobs: Jobs, slurm: Cluster):
    """A job of higher priority takes the nodes: the run saves, Slurm requeues, the run resumes."""
    job = jobs["preemption"]
    job.arrived()
    urgent = slurm.run(
        "sbatch", "--parsable", "--nodes=2", "--gres=seat:1", "--output=/dev/null", "--wrap=sleep 1"
    )
    wait_for(lambda: job.kinds() == ["ended"], LONG, "preempted", job.log)
    job.open_gate()
    check_resumed(job, jobs["success"], ["ended", "done"])
    assert "JobState=COMPLETED" in slurm.run("scontrol", "show", "job", urgent.strip())


def test_killed_rank(jobs: Jobs):
    """A rank dies: the job resumes from the last checkpoint, and the record names the node."""
    job = jobs["killed_rank"]
    pids = job.arrived()
    os.kill(pids[1], signal.SIGKILL)
    job.open_gate()
    check_resumed(job, jobs["success"], ["failed", "done"])
    assert read_attempts(job.folder)[0].reason.startswith("node n2: rank 1 was ended by SIGKILL")


def test_cancel(jobs: Jobs, slurm: Cluster):
    """A cancelled job saves in the time that Slurm gives it, and stays cancelled."""
    job = jobs["cancel"]
    job.arrived()
    slurm.run("scancel", job.number)
    wait_for(lambda: job.kinds() == ["ended"], LONG, "cancelled", job.log)
    job.wait("CANCELLED")
    assert tracked_iteration(job.folder) == 4
    assert job.show("Restarts") == "0"


def test_repeated_failure(jobs: Jobs):
    """A job that fails at the same step again is not restarted for ever."""
    job = jobs["repeated_failure"]
    job.wait("COMPLETED", *ENDED_BADLY)
    assert (job.state(), job.show("ExitCode")) == ("FAILED", "1:0")
    assert job.kinds() == ["failed", "failed"]
    said = (job.folder / "logs" / f"repeated_failure-{job.number}.log").read_text()
    assert "RuntimeError: the test wants it so" in said
    assert "step 3 has not been passed in 2 starts: not started again" in said


def test_bad_input(jobs: Jobs):
    """Bad input is not retried."""
    job = jobs["bad_input"]
    job.wait("COMPLETED", *ENDED_BADLY)
    assert (job.state(), job.show("ExitCode")) == ("FAILED", "2:0")
    assert job.kinds() == ["refused"]
    assert "data.path=/nowhere" in (job.folder / "logs" / f"bad_input-{job.number}.log").read_text()


def test_array(jobs: Jobs):
    """Each task of an array is a run of its own."""
    job = jobs["array"]
    tasks = [replace(job, number=f"{job.number}_{task}") for task in range(2)]
    for number, task in enumerate(tasks):
        task.wait("COMPLETED", *ENDED_BADLY)
        assert task.state() == "COMPLETED", job.log()
        assert [attempt.kind for attempt in read_attempts(job.folder / str(number))] == ["done"]
    undisturbed = losses(jobs["success"].folder)
    assert losses(job.folder / "0") == undisturbed
    assert losses(job.folder / "1") != undisturbed


def test_chain(jobs: Jobs, slurm: Cluster):
    """A stage waits for its predecessor, also where that must continue as another job."""
    job = jobs["chain"]
    stage = jobs.run("second", f"checkpoint.load={job.folder}")
    second = make_job(
        stage, PROFILE, name="second", dependency=[f"afterok:{job.number}"], before=job.folder
    )
    after = Submitted(
        job=second,
        number=slurm.run("sbatch", "--parsable", str(write_job(second))).strip(),
        slurm=slurm,
    )
    job.arrived()
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait(*ENDED_BADLY)
    assert job.show("ExitCode") == "75:0"
    job.open_gate()
    after.wait("COMPLETED", *ENDED_BADLY)
    assert after.state() == "COMPLETED", after.log() + job.log()
    assert job.kinds() == ["stopped", "done"]
    first, continuation = read_attempts(job.folder)
    assert first.series == continuation.series == first.job == job.number
    assert continuation.job != first.job
    assert losses(job.folder) == losses(jobs["success"].folder)
    # It starts from the weights of the first.
    assert losses(after.folder)[1] < losses(job.folder)[1]


def test_lost_node(jobs: Jobs, slurm: Cluster):
    """A node fails and comes back. This test is last: all other jobs on the node end with it."""
    job = jobs["lost_node"]
    job.arrived()
    slurm.stop_node("n1")
    job.wait("PENDING")
    assert job.show("Restarts") == "1"
    job.open_gate()
    slurm.start_node("n1")
    slurm.run("scontrol", "update", "nodename=n1", "state=resume")
    check_resumed(job, jobs["success"], ["failed", "done"])
