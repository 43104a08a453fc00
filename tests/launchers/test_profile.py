"""Site profiles: strict reading, search by name, and a fix in every refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchers.profile import (
    Container,
    Mount,
    Profile,
    minutes,
    profile_from_yaml,
    profile_names,
    read_profile,
)
from mellum2_megatron.common.errors import InputError
from tests import REPOSITORY

SAMPLES = REPOSITORY / "docs" / "examples" / "profiles"


def read(text: str) -> Profile:
    return profile_from_yaml(text, name="site")


def test_a_profile_with_everything():
    profile = read(
        """
        account: nlp
        partition: h100
        time: "1-12:00:00"
        gpus_per_node: 8
        cpus_per_task: 96
        memory: 1800G
        sbatch: {constraint: h100, nice: 10, spread-job: true}
        container:
          image: registry.site#nvidia/pytorch:25.10-py3
          runtime: pyxis
          mounts:
            - /lustre
            - /raid/data:/data:ro
            - {source: /home, target: /home, read_only: true}
        modules: [slurm, cuda/13.0]
        environment: [WANDB_API_KEY]
        variables: {NCCL_DEBUG: INFO, OMP_NUM_THREADS: 8}
        """
    )
    assert profile == Profile(
        name="site",
        account="nlp",
        partition="h100",
        time="1-12:00:00",
        gpus_per_node=8,
        cpus_per_task=96,
        memory="1800G",
        sbatch={"constraint": "h100", "nice": "10", "spread-job": True},
        container=Container(
            image="registry.site#nvidia/pytorch:25.10-py3",
            runtime="pyxis",
            mounts=(
                Mount(source="/lustre", target="/lustre"),
                Mount(source="/raid/data", target="/data", read_only=True),
                Mount(source="/home", target="/home", read_only=True),
            ),
        ),
        modules=("slurm", "cuda/13.0"),
        environment=("WANDB_API_KEY",),
        variables={"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "8"},
    )
    assert profile.resolved_device == "cuda"
    assert profile.resolved_ranks_per_node == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acount: nlp", "acount: no such key in a profile. Fix: did you mean 'account'"),
        (
            "container: {image: a.sif, runtime: apptainer, mount: []}",
            "container.mount: no such key in a profile. Fix: did you mean 'container.mounts'",
        ),
        (
            "account: a\nqos: b\naccount: c",
            "profile, line 3: not YAML (key account is given twice)",
        ),
        ("time: soon", 'time: soon: is no time of Slurm. Fix: write it like "1-12:00:00"'),
        ('time: "3"', "time: 3: must be longer than grace_seconds (180)"),
        ("memory: lots", "memory: lots: is a node's memory, a number with K, M, G or T"),
        (
            "executor: slrum",
            "executor=slrum: must be 'slurm' or 'local'. Fix: did you mean 'slurm'",
        ),
        ("gpus_per_node: many", "gpus_per_node=many: must be a whole number"),
        ("gpus_per_node: -1", "gpus_per_node: -1: must be 0 or more"),
        ("device: cuda", "device: cuda without gpus_per_node: ranks need GPUs"),
        (
            "{gpus_per_node: 4, ranks_per_node: 8}",
            "ranks_per_node: 8 with gpus_per_node: 4: each rank has a GPU",
        ),
        ("sbatch: {time: 5}", "sbatch.time: has a key of its own, time. Fix: set time"),
        ("sbatch: {job-name: x}", "sbatch.job-name: is set by the job itself. Fix: drop it"),
        ("sbatch: {'-C': x}", "sbatch.-C: is no long flag of sbatch"),
        ("sbatch: [a]", "sbatch: list: must be a mapping of names to values"),
        ("environment: [A=1]", "variable 'A': is listed with a value"),
        ("environment: [a-b]", "variable 'a-b': is no name of a variable"),
        ("variables: {folder: /x}", "variable folder: is set by the batch script"),
        ("environment: [SLURM_JOB_ID]", "variable SLURM_JOB_ID: is set by the batch script"),
        ('account: "a\\nrm -rf x"', r"account='a\nrm -rf x': is one line of text"),
        ('partition: "a\\rb"', "partition="),
        ("qos: |\n  a\n  b", "qos="),
        ("qos: ''", "qos='': must not be empty"),
        ('sbatch: {comment: "a\\n#SBATCH --uid=0"}', "sbatch.comment="),
        ('srun: ["--x=a\\u2028b"]', "srun[0]="),
        ('python: "a\\0b"', "python="),
        ('variables: {A: "x\\ny"}', "variables.A: must be one line"),
        ("time: " + "9" * 30, "is no time of Slurm"),
        ("memory: " + "9" * 30, "is a node's memory"),
        ("nodes: 70000", "nodes: 70000: must not exceed 65533"),
        ("grace_seconds: 65536", "grace_seconds: 65536: must not exceed 65535"),
        ("tries: " + "9" * 5000, "tries="),
        ("environment: A", "environment=A: must be list of text"),
        ("{environment: [A], variables: {A: b}}", "A under environment and variables"),
        ("container: {runtime: pyxis}", "container.image is missing"),
        (
            "container: {image: a, runtime: docker}",
            "container.runtime=docker: must be 'pyxis' or",
        ),
        ("container: image.sqsh", "container: image.sqsh: must be a mapping"),
        (
            "container: {image: a, runtime: pyxis, mounts: /a}",
            "container.mounts: /a: must be a list",
        ),
        (
            "container: {image: a, runtime: pyxis, mounts: ['a:b']}",
            "mount source a: must be an absolute path",
        ),
        (
            "container: {image: a, runtime: pyxis, mounts: ['/a:/b:rx']}",
            "container.mounts[0]='/a:/b:rx': is no mount",
        ),
        (
            "container: {image: a, runtime: pyxis, mounts: ['/a,b']}",
            "container runtimes separate mounts",
        ),
        (
            "container: {image: a, runtime: enroot, workdir: /w}",
            "container.workdir=/w: enroot has no such option",
        ),
        ("- a", "profile: ['a']: must be a mapping"),
        ("a: [", "profile, line 1: not YAML"),
    ],
)
def test_bad_profiles_are_refused_with_a_fix(text: str, message: str):
    with pytest.raises(InputError) as error:
        read(text)
    assert message in str(error.value)


def test_words_without_quotes_stay_as_they_are_written():
    """YAML 1.1 would read a number of seconds, the number 83, true and a date."""
    profile = read(
        """
        account: 0123
        time: 24:00:00
        qos: 2026-01-02
        memory: 1000
        sbatch: {mail-type: none, nice: 010, spread-job: true}
        variables: {A: yes, B: 1.0, C: 0x10}
        """
    )
    assert (profile.account, profile.time, profile.qos) == ("0123", "24:00:00", "2026-01-02")
    assert profile.memory == "1000"
    assert profile.sbatch == {"mail-type": "none", "nice": "010", "spread-job": True}
    assert profile.variables == {"A": "yes", "B": "1.0", "C": "0x10"}
    assert read("account: none").account == "none"
    assert read("account: null").account is None


@pytest.mark.parametrize(
    "text",
    [
        "variables: {https_proxy: 'http://me:hunter2@proxy:80'}",
        "environment: [HF_TOKEN=hunter2]",
        "setup: ['export WANDB_API_KEY=hunter2']",
        "setup: ['export PATH=/x GITHUB_PAT=\"hunter2\"']",
        "srun: ['--export=ALL,DB_PW=hunter2']",
        "container: {image: 'docker://me:hunter2@host/x', runtime: pyxis}",
        "sbatch: {comment: 'api_key=hunter2'}",
    ],
)
def test_secrets_anywhere_in_a_profile_are_refused_and_not_repeated(text: str):
    with pytest.raises(InputError) as error:
        read(text)
    assert "hunter2" not in str(error.value)
    assert "environment: " in error.value.fix or "names alone" in error.value.fix


def test_lines_of_bash_that_read_a_secret_elsewhere_are_fine():
    lines = ("export HF_TOKEN=$(cat ~/.token)", 'export WANDB_API_KEY="$KEY"', "module load x")
    assert read(f"setup: {list(lines)}").setup == lines


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "db_password", "AWS_SECRET"])
def test_secrets_are_refused_and_not_repeated(name: str):
    for value in ("hunter2", "[hunter2]"):
        with pytest.raises(InputError) as error:
            read(f"variables: {{{name}: {value}}}")
        assert "hunter2" not in str(error.value)
    with pytest.raises(
        InputError, match=rf"Fix: set it in your shell and list its name: environment: \[{name}\]"
    ):
        read(f"variables: {{{name}: x}}")


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 90),
        ("90:30", 90.5),
        ("4:30:00", 270),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("2-00:00:30", 2880.5),
    ],
)
def test_time_as_sbatch_reads_it(time: str, expected: float):
    assert minutes(time) == expected


def test_found_by_name_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MELLUM2_PROFILES", str(tmp_path / "site"))
    for number, folder in enumerate(("profiles", "site", "home/.config/mellum2/profiles")):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("a", "b", "c")[: number + 1]:
            (tmp_path / folder / f"{name}.yaml").write_text(
                f"partition: {folder.partition('/')[0]}\naccount: none\n"
            )
    assert [read_profile(name).partition for name in "abc"] == ["profiles", "site", "home"]
    assert read_profile("site/b.yaml").name == "b"
    assert profile_names() == ("a", "b", "c")
    (tmp_path / "profiles" / "cluster.yaml").write_text("acount: none")
    with pytest.raises(
        InputError, match=r"profile 'clustr': there is no such profile in .*did you mean 'cluster'"
    ):
        read_profile("clustr")
    with pytest.raises(InputError, match=r"^profiles/cluster.yaml: acount: no such key"):
        read_profile("cluster")
    with pytest.raises(InputError, match=r"profile gone.yaml: cannot be read"):
        read_profile("gone.yaml")


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_samples_can_be_read(path: Path):
    profile = read_profile(path)
    assert profile.name == path.stem
    assert profile.executor == ("local" if path.stem == "laptop" else "slurm")


def test_samples_are_there():
    assert {path.stem for path in SAMPLES.glob("*.yaml")} == {
        "apptainer",
        "bare",
        "laptop",
        "pyxis",
    }


def test_mounts_cover_whole_folder_names():
    container = Container(
        image="a.sif",
        runtime="apptainer",
        mounts=(
            Mount(source="/lustre", target="/lustre"),
            Mount(source="/other", target="/lustre/moved"),
        ),
    )
    assert container.covers("/lustre/runs/x")
    assert not container.covers("/lustre/moved/x")
    assert not container.covers("/lustre2/x")


@pytest.mark.parametrize(
    ("image", "runtime", "is_file"),
    [
        ("/images/a.sqsh", "pyxis", True),
        ("a.sif", "apptainer", True),
        ("registry.site#nvidia/pytorch:25.10-py3", "pyxis", False),
        ("docker://ubuntu:24.04", "apptainer", False),
        ("ubuntu:24.04", "pyxis", False),
        ("sandbox", "apptainer", True),
    ],
)
def test_images_that_are_files(image: str, runtime: str, is_file: bool):
    assert (Container(image=image, runtime=runtime).image_file is not None) == is_file  # type: ignore[arg-type]
