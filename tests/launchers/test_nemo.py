"""NeMo-Run: submissions, states, its command line, and the facts that our script works around."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from launchers.launch_record import read_launches
from launchers.profile import Container, Mount, Profile, profile_from_yaml
from launchers.sbatch import render
from launchers.submission import prepare, prepare_chain
from mellum2_megatron.checkpoint.folder import tracked_iteration
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run, apply_overrides, from_yaml, to_yaml
from tests.cli.runner import mellum2
from tests.launchers.jobs import make_job
from tests.launchers.test_slurm_commands import Fake, fake, words

pytestmark = pytest.mark.launch

__all__ = ["fake"]

SITE = Profile(
    name="site", account="nlp", time="1-00:00:00", ranks_per_node=2, variables={"NAME": "a $b 'c'"}
)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Move NeMo-Run's experiments to a temporary folder; it reads its variable once, on import."""
    if os.environ.get("MELLUM2_REQUIRE_SLURM") != "1":
        pytest.importorskip(
            "nemo_run", reason="NeMo-Run is not installed; `make setup-launch` installs it"
        )
    from nemo_run.config import get_nemorun_home, set_nemorun_home

    before, folder = get_nemorun_home(), tmp_path_factory.mktemp("nemo home")
    set_nemorun_home(str(folder))
    yield folder
    set_nemorun_home(before)


@pytest.fixture(scope="session")
def nemo(home: Path) -> ModuleType:
    from launchers import nemo

    return nemo


@pytest.fixture(scope="session")
def run_(nemo: ModuleType) -> ModuleType:
    import nemo_run

    return nemo_run


@pytest.fixture(autouse=True)
def no_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace stdin: invoke, which runs NeMo-Run's commands, reads it, and pytest forbids that."""
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield


@pytest.fixture
def run_file(run: Run, tmp_path: Path) -> str:
    (tmp_path / "given.yaml").write_text(to_yaml(run))
    return str(tmp_path / "given.yaml")


def dry_script(run_: ModuleType, task: Any, executor: Any, name: str = "small") -> str:
    """Return the script that an experiment would submit."""
    with run_.Experiment("test", log_level="ERROR", clean_mode=True) as experiment:
        experiment.add(task, executor=executor, name=name)
        experiment.dryrun(log=False, delete_exp_dir=False)
        return Path(experiment._exp_dir, f"{name}_sbatch.sh").read_text()


# ------------------------------------------------------------------------------
# Submission
# ------------------------------------------------------------------------------


def containers(folder: Path) -> dict[str, Container | None]:
    (folder / "image.sif").write_text("")
    mounts = (Mount(source="/", target="/"),)
    kinds = ("pyxis", "apptainer", "enroot")
    given: dict[str, Container | None] = {
        kind: Container(image=str(folder / "image.sif"), runtime=kind, mounts=mounts)  # type: ignore[arg-type]
        for kind in kinds
    }
    return given | {"none": None}


@pytest.mark.parametrize("kind", ["none", "pyxis", "apptainer", "enroot"])
def test_the_script_is_ours(
    nemo: ModuleType, run_: ModuleType, run: Run, run_file: str, tmp_path: Path, kind: str
) -> None:
    """NeMo-Run submits the script of `--render sbatch`, byte for byte."""
    profile = dataclasses.replace(SITE, container=containers(tmp_path)[kind])
    code = tmp_path / "code"
    script = dry_script(
        run_,
        nemo.task(run_file, overrides=["seed=7"]),
        nemo.slurm_executor(profile, nodes=2, code=code),
    )
    assert script == render(
        make_job(apply_overrides(run, ["seed=7"]), profile, name="small", nodes=2, code=code)
    )
    # A dry run writes NeMo-Run's own files only.
    assert not Path(str(run.checkpoint.output)).exists()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_an_array(nemo: ModuleType, run_: ModuleType, run: Run, run_file: str) -> None:
    sweep = [["seed=1"], ["seed=2", "optimizer.lr=1e-4"]]
    script = dry_script(run_, nemo.task(run_file), nemo.slurm_executor(SITE, sweep=sweep))
    assert script == render(make_job(run, SITE, name="small", sweep=sweep))


def test_a_profile_survives_the_way_through_nemo_run(nemo: ModuleType, tmp_path: Path) -> None:
    for container in containers(tmp_path).values():
        profile = dataclasses.replace(
            SITE,
            container=container,
            sbatch={"constraint": "h100", "spread-job": True},
            srun=("--mpi=none",),
            tries=5,
        )
        assert profile_from_yaml(nemo.profile_text(profile), name="other") == profile
        assert nemo.slurm_executor(profile).clone().profile == profile


def test_submitting_an_experiment(
    nemo: ModuleType, run_: ModuleType, run: Run, run_file: str, fake: Fake, home: Path
) -> None:
    """A user's own experiment: submission, record in the run folder, status and cancel."""
    fake("sbatch", "41\n")
    fake(
        "scontrol",
        "JobId=41 JobName=small JobState=RUNNING Reason=None Restarts=2 ExitCode=0:0 NodeList=n1\n",
    )
    with run_.Experiment(
        "mine", log_level="ERROR", clean_mode=True, enable_goodbye_message=False
    ) as experiment:
        experiment.add(nemo.task(run_file), executor=nemo.slurm_executor(SITE), name="small")
        experiment.run(detach=True)
    folder = Path(str(run.checkpoint.output))
    assert words("sbatch") == ["--parsable", str(folder / "job.sbatch")]
    assert (folder / "job.sbatch").read_text() == render(make_job(run, SITE, name="small"))
    (launch,) = read_launches(folder)
    assert (launch.job_id, launch.experiment, launch.profile) == ("41", experiment._id, "site")
    assert launch.code["version"]
    told = json.loads((folder / "provenance.jsonl").read_text())
    assert (told["event"], told["job"], told["world_size"]) == ("launch", "41", 2)

    again = run_.Experiment.from_id(experiment._id)
    assert str(again.status(return_dict=True)["small"]["status"]) == "RUNNING"
    fake("scancel")
    again.cancel("small")
    assert words("scancel") == ["41"]


@pytest.mark.slow
@pytest.mark.distributed
def test_on_this_machine(
    nemo: ModuleType, run: Run, run_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = Path(str(run.checkpoint.output))
    words_ = [
        "launch",
        run_file,
        "layout.ep=1",
        "--executor",
        "local",
        "--nproc",
        "1",
        "--allow-dirty",
    ]
    result = mellum2(*words_)
    assert result.code == 0, result
    assert tracked_iteration(folder) == 2
    assert "step 2/2" in result.out
    (launch,) = read_launches(folder)
    assert (launch.executor, launch.nodes, launch.ranks_per_node, launch.script) == (
        "local",
        1,
        1,
        None,
    )
    assert launch.experiment

    # A failure of the training is one message of `launch`.
    def broken(path: Any, value: Run) -> None:
        path.write_text(
            to_yaml(
                dataclasses.replace(value, data=dataclasses.replace(value.data, path="/nowhere"))
            )
        )

    monkeypatch.setattr(
        nemo.experiments, "write_run_folder", lambda value: broken(folder / "run.yaml", value)
    )
    failed = mellum2(*words_, "schedule.train_samples=144")
    assert failed.code == 1
    assert "/nowhere" in failed.out
    assert "error: small did not finish" in failed.err


def test_tasks_that_wait_for_each_other(
    nemo: ModuleType, run_: ModuleType, run: Run, fake: Fake, tmp_path: Path
) -> None:
    checkpoint = dataclasses.replace(run.checkpoint, output=None, load="anywhere")
    first = dataclasses.replace(
        run, name="first", checkpoint=dataclasses.replace(checkpoint, load=None)
    )
    second = dataclasses.replace(run, name="second", checkpoint=checkpoint)
    fake("sbatch", "41\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launchers.submission.package", _package)
        chain = prepare_chain([first, second], SITE, root=tmp_path / "runs", allow_dirty=True)
    nemo.submit("chain", chain)
    assert words("sbatch")[1:] == [
        "--dependency=afterok:41",
        "--kill-on-invalid-dep=yes",
        str(tmp_path / "runs/second/job.sbatch"),
    ]
    written = from_yaml((tmp_path / "runs/second/run.yaml").read_text())
    assert written.checkpoint.load == str(tmp_path / "runs/first")
    assert read_launches(tmp_path / "runs/second")[0].dependency == ("afterok:41",)


def _package(*_: Any, **__: Any) -> Any:
    from launchers.packaging import Package
    from mellum2_megatron.common.provenance import Code

    return Package(folder=Path("/"), code=Code(origin="package", version="1"))


def test_a_small_job_of_a_large_node_stays_small(nemo: ModuleType, run: Run, fake: Fake) -> None:
    """The prepared job is the submitted one, also with fewer ranks than a node has."""
    fake("sbatch", "41\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launchers.submission.package", _package)
        prepared = prepare(
            apply_overrides(run, ["layout.dp=2"]),
            dataclasses.replace(SITE, ranks_per_node=8),
            allow_dirty=True,
        )
    assert prepared.job.world_size == 2
    nemo.submit("small", [prepared])
    assert (prepared.job.folder / "job.sbatch").read_text() == render(prepared.job)


def test_other_tasks_tunnels_and_profiles_are_refused(
    nemo: ModuleType, run_: ModuleType, run_file: str
) -> None:
    with pytest.raises(InputError, match="trainings of this project"):
        dry_script(run_, run_.Script(path="other.sh"), nemo.slurm_executor(SITE))
    executor = nemo.slurm_executor(SITE)
    executor.tunnel = run_.SSHTunnel(host="login", user="me", job_dir="/x")
    with pytest.raises(InputError, match="login node"):
        dry_script(run_, nemo.task(run_file), executor)
    with pytest.raises(InputError, match="not for Slurm"):
        nemo.slurm_executor(Profile(name="here", executor="local"))


@pytest.mark.parametrize(
    ("states", "wanted"),
    [
        (["COMPLETED", "COMPLETED"], "SUCCEEDED"),
        (["COMPLETED", "FAILED"], "FAILED"),
        (["FAILED", "PENDING"], "PENDING"),
        (["RUNNING", "FAILED", "PENDING"], "RUNNING"),
        (["COMPLETING"], "RUNNING"),
        (["CANCELLED", "COMPLETED"], "CANCELLED"),
        (["CONFIGURING"], "PENDING"),
        (["NODE_FAIL"], "FAILED"),
    ],
)
def test_one_state_for_all_tasks(nemo: ModuleType, states: list[str], wanted: str) -> None:
    assert nemo.overall(states).name == wanted


# ------------------------------------------------------------------------------
# NeMo-Run's command line
# ------------------------------------------------------------------------------


def test_recipes_and_profiles_are_factories(
    nemo: ModuleType, run_: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_run.cli.api import list_factories, resolve_factory

    make = resolve_factory(run_.Script, "mellum2_tiny_pretrain")
    built = run_.config.fdl.build(make(overrides="seed=3", output="runs/x"))
    assert built == nemo.task("mellum2_tiny_pretrain", overrides=["seed=3"], output="runs/x")
    assert from_yaml(built.metadata["mellum2_run"]).seed == 3
    assert len(list_factories(run_.Script)) >= 10

    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/big.yaml").write_text("account: nlp\ngpus_per_node: 8\n")
    monkeypatch.chdir(tmp_path)
    nemo.registration.register_factories()
    executor = run_.config.fdl.build(resolve_factory(run_.Executor, "big")(nodes=4))
    assert isinstance(executor, nemo.Mellum2SlurmExecutor)
    assert (executor.nodes, executor.profile.gpus_per_node) == (4, 8)


def test_nemo_runs_command_line(
    nemo: ModuleType,
    run: Run,
    run_file: str,
    fake: Fake,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`nemo mellum2 launch training=RECIPE executor=PROFILE`, with options of both."""
    from nemo_run.cli.api import create_cli

    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/big.yaml").write_text("account: none\n")
    monkeypatch.chdir(tmp_path)
    nemo.registration.register_factories()
    fake("sbatch", "41\n")
    fake("scontrol", "JobId=41 JobName=x JobState=PENDING Reason=None Restarts=0 ExitCode=0:0\n")
    overrides = [
        f"data.path={run.data.path}",
        "data.sequence_length=64",
        "architecture.vocab_size=384",
        "seed=3",
    ]
    options = f"overrides='{' '.join(overrides)}', output='{tmp_path}/runs/x'"
    training = f"training=mellum2_tiny_pretrain({options})"
    monkeypatch.setattr(
        sys,
        "argv",
        ["nemo", "mellum2", "launch", training, "executor=big(nodes=2)", "name=x", "--yes"],
    )
    with pytest.raises(SystemExit) as end:
        create_cli()()
    assert not end.value.code
    written = from_yaml((tmp_path / "runs/x/run.yaml").read_text())
    assert (written.name, written.seed) == ("mellum2_tiny_pretrain", 3)
    assert "#SBATCH --nodes=2" in (tmp_path / "runs/x/job.sbatch").read_text()
    assert read_launches(tmp_path / "runs/x")[0].job_id == "41"


def test_entry_points_lead_here(nemo: ModuleType) -> None:
    (scheduler,) = importlib.metadata.entry_points(group="torchx.schedulers", name=nemo.SCHEDULER)
    assert scheduler.load() is nemo.create_scheduler
    (cli,) = importlib.metadata.entry_points(group="nemo_run.cli", name="mellum2")
    assert cli.load() is nemo


# ------------------------------------------------------------------------------
# Fault tolerance
# ------------------------------------------------------------------------------


@pytest.fixture
def resiliency(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nemo: ModuleType) -> Path:
    """Install a stand-in of the resiliency extension and its command."""
    (tmp_path / "site/nvidia_resiliency_ext").mkdir(parents=True)
    (tmp_path / "site/nvidia_resiliency_ext/__init__.py").write_text("")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.1")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ft_launcher").write_text("#!/bin/sh\n")
    (tmp_path / "bin/ft_launcher").chmod(0o755)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(nemo.tasks, "_PATH", str(tmp_path / "bin"))
    monkeypatch.delitem(sys.modules, "nvidia_resiliency_ext", raising=False)
    return tmp_path


def test_ranks_under_the_fault_tolerance_launcher(
    nemo: ModuleType, run_: ModuleType, run: Run, run_file: str, resiliency: Path
) -> None:
    launcher = nemo.fault_tolerance(max_restarts=2)
    assert launcher.rdzv_port != nemo.fault_tolerance().rdzv_port
    executor = run_.SlurmExecutor(account="nlp", nodes=2, ntasks_per_node=2, launcher=launcher)
    executor.packager = run_.Packager()
    script = dry_script(run_, nemo.rank_task(run_file, device="cpu"), executor)
    command = next(
        line for line in script.splitlines() if "ft_launcher" in line and line.startswith("srun")
    )
    assert "--max-restarts 2" in command
    assert "--nproc-per-node 2" in command
    assert f":{launcher.rdzv_port}" in command
    assert f"-m mellum2_megatron.training {run.checkpoint.output}/run.yaml --device cpu" in command
    assert from_yaml(Path(str(run.checkpoint.output), "run.yaml").read_text()).name == run.name


def test_the_fault_tolerance_launcher_where_it_is_not_installed(
    nemo: ModuleType, resiliency: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.1")
    with pytest.raises(InputError, match=r"0\.4\.1: is too old"):
        nemo.fault_tolerance()
    (resiliency / "bin/ft_launcher").unlink()
    with pytest.raises(InputError, match=r"pip install 'nvidia-resiliency-ext>=0\.6\.0'"):
        nemo.fault_tolerance()


# ------------------------------------------------------------------------------
# Reasons for a script of our own: each test fails when NeMo-Run has changed
# ------------------------------------------------------------------------------


def their_script(run_: ModuleType, **settings: Any) -> str:
    executor = run_.SlurmExecutor(account="nlp", nodes=2, packager=run_.Packager(), **settings)
    return dry_script(
        run_, run_.Script(path="train.py", entrypoint="python"), executor, name="task"
    )


def test_upstream_looks_an_executor_up_by_its_exact_class(
    nemo: ModuleType, run_: ModuleType, run_file: str
) -> None:
    @dataclasses.dataclass(kw_only=True)
    class Other(run_.SlurmExecutor):  # type: ignore[misc,name-defined]
        pass

    from nemo_run.run.torchx_backend.schedulers.api import get_executor_str

    with pytest.raises(KeyError):
        get_executor_str(Other(account="x"))
    assert get_executor_str(nemo.slurm_executor(SITE)) == nemo.SCHEDULER
    for attribute in (
        "_PARALLEL_SUPPORTED_EXECUTORS",
        "_DETACH_SUPPORTED_EXECUTORS",
        "_DEPENDENCY_SUPPORTED_EXECUTORS",
    ):
        assert nemo.Mellum2SlurmExecutor in getattr(run_.Experiment, attribute)
        assert run_.SlurmExecutor in getattr(run_.Experiment, attribute)


def test_upstream_exports_variables_unquoted(run_: ModuleType) -> None:
    script = their_script(run_, env_vars={"SECRET": "a b; touch /tmp/x"})
    assert "\nexport SECRET=a b; touch /tmp/x\n" in script


def test_upstream_has_one_port_for_all_jobs(run_: ModuleType) -> None:
    assert ":29500" in their_script(run_, launcher="torchrun")
    assert run_.FaultTolerance().rdzv_port == 29500


def test_upstream_signals_the_steps_and_requeues_failures_only(run_: ModuleType) -> None:
    script = their_script(run_, signal="USR1@60")
    assert "#SBATCH --signal=USR1@60" in script
    assert "trap" not in script
    assert 'if [ $exitcode -ne 0 ]; then\n    if [ "$TORCHX_MAX_RETRIES" -gt' in script
    assert script.count("scontrol requeue") == 1


def test_upstream_shows_arrays_as_unknown(
    run_: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_run.run.torchx_backend.schedulers import slurm

    output = "JobID|JobName|State\n12_0|nlp-nlp.task|COMPLETED\n12_1|nlp-nlp.task|COMPLETED"
    scheduler = slurm.create_scheduler("test")
    scheduler.tunnel = SimpleNamespace(run=lambda command: SimpleNamespace(stdout=output))
    monkeypatch.setattr(slurm, "_get_job_dirs", lambda: {"12": ("", scheduler.tunnel, "")})
    described = scheduler.describe("12")
    assert described is not None
    assert described.state.name == "UNKNOWN"


def test_upstream_packages_the_commit_alone(run_: ModuleType, tmp_path: Path) -> None:
    root, job = tmp_path / "repository", tmp_path / "job"
    job.mkdir()
    root.mkdir()
    (root / "a.py").write_text("VALUE = 1\n")
    commit = ["-c", "user.name=t", "-c", "user.email=t@x", "commit", "-qm", "first"]
    for command in (["init", "-q"], ["add", "-A"], commit):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    (root / "a.py").write_text("VALUE = 2\n")
    with contextlib.chdir(root):
        archive = run_.GitArchivePackager(include_submodules=False).package(root, str(job), "x")
    subprocess.run(["tar", "-xf", archive, "-C", str(job)], check=True)
    assert (job / "a.py").read_text() == "VALUE = 1\n"
