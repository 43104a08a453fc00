"""`mellum2 launch` on the command line, without NeMo-Run and Slurm: output, files and refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import subprocess
from pathlib import Path

import pytest

from launchers import packaging
from launchers.preview import estimate
from launchers.profile import read_profile
from launchers.sbatch import render
from launchers.submission import split_stages
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.config import Run, apply_overrides, from_yaml, to_yaml
from mellum2_megatron.data.feed import index_plan
from mellum2_megatron.recipes import recipe, recipe_names
from tests.cli.runner import Result, mellum2
from tests.launchers.jobs import make_job

PROFILE = "account: none\nranks_per_node: 2\n"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Path:
    """Change to a folder with a run file and a profile.

    A checkout without changes takes the place of this one.
    """
    code = tmp_path / "code"
    (code / "mellum2_megatron").mkdir(parents=True)
    (code / "mellum2_megatron/__init__.py").write_text("")
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@x", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", "-C", str(code), *words], check=True)
    monkeypatch.setattr(packaging, "project_root", lambda: code)
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "run.yaml").write_text(to_yaml(run))
    (folder / "site.yaml").write_text(PROFILE)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))  # hides the profiles of whoever runs the tests
    return folder


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git = subprocess.run(
        ["which", "git"], check=True, capture_output=True, text=True
    ).stdout.strip()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").symlink_to(git)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def no_nemo_run(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "nemo_run" else find_spec(name, *rest),
    )


def launch(*words: str | Path) -> Result:
    return mellum2("launch", *words)


def refused(run: Run, result: Result, *named: str) -> None:
    """Check that there is one message and nothing is written."""
    result.refused(*named)
    assert not Path(str(run.checkpoint.output)).exists()


# ------------------------------------------------------------------------------
# Previews
# ------------------------------------------------------------------------------


def test_a_dry_run_shows_everything_and_writes_nothing(
    run: Run, place: Path, no_slurm: None
) -> None:
    before = sorted(place.rglob("*"))
    result = launch("run.yaml", "seed=7", "--profile", "site.yaml", "--nodes", "2", "--dry-run")
    assert result.code == 0, result
    text = result.out
    job = make_job(
        apply_overrides(run, ["seed=7"]),
        read_profile("./site.yaml"),
        nodes=2,
        code=place.parent / "code",
    )
    script = render(job)
    assert text.endswith(f"# The script\n{script}\n"), (text, script)
    shown = text[text.index("name: small") : text.index("Pipeline stages")]
    assert from_yaml(shown) == job.run
    assert "memory" in text
    assert "2 nodes of 2 cpu ranks" in text
    assert "there is no rate to assume for CPUs" in text
    assert sorted(place.rglob("*")) == before
    assert not Path(str(run.checkpoint.output)).exists()


def test_missing_indices_that_would_hold_up_a_job_are_said(
    run: Run, place: Path, no_slurm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run.yaml", f"data.cache={place / 'cache'}", "--profile", "site.yaml", "--dry-run")
    assert "data index" not in launch(*words).out
    monkeypatch.setattr(index_plan, "LARGE", 1)
    assert "Build them before: `mellum2 data index`" in launch(*words).out
    # Data of another machine are not looked at.
    assert "data index" not in launch(*words, "data.path=/nowhere").out


def test_a_recipe_in_a_file_names_the_job_and_travels_with_it(
    run: Run, place: Path, no_slurm: None, no_nemo_run: None
) -> None:
    (place / "mine.py").write_text(
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from mellum2_megatron.config import from_yaml\n"
        "def my_window():\n"
        "    base = from_yaml(Path('run.yaml').read_text())\n"
        "    nowhere = replace(base.checkpoint, output=None)\n"
        "    return replace(base, name='my_window', checkpoint=nowhere)\n"
    )
    words = ("mine.py:my_window", "--profile", "site.yaml", "--nodes", "1", "--render", "sbatch")
    result = launch(*words)
    assert result.code == 0, result
    assert "#SBATCH --job-name=my_window" in result.out
    folder = place / "runs" / "my_window"
    assert (folder / "recipe.py").read_bytes() == (place / "mine.py").read_bytes()
    assert read_run(folder / "run.yaml").source("name") == (
        f"{place / 'mine.py'}:my_window, "
        f"sha256 {hashlib.sha256((folder / 'recipe.py').read_bytes()).hexdigest()}"
    )
    launch("mine.py:my_windo", *words[1:]).refused("did you mean 'my_window'")


def test_a_dry_run_shows_reasons_for_a_refusal(run: Run, place: Path, no_slurm: None) -> None:
    """A dry run needs no data. A broken rule of the run itself is refused all the same."""
    (place.parent / "code/mellum2_megatron/__init__.py").write_text("changed")
    words = ["--profile", "site.yaml", "--dry-run"]
    shown = launch("mellum2_12b_pretrain_phase2", "--profile", "gpu.yaml", "--dry-run")
    shown.refused("gpu.yaml")
    (place / "gpu.yaml").write_text(
        "account: nlp\ngpus_per_node: 8\ncontainer: {image: /no.sif, runtime: apptainer}\n"
    )
    shown = launch("mellum2_12b_pretrain_phase2", "--profile", "gpu.yaml", "--dry-run")
    assert shown.code == 2, shown
    assert "256 ranks: 32 nodes of 8 cuda ranks" in shown.out
    assert "#SBATCH --nodes=32" in shown.out
    for problem in ("__init__.py", "checkpoint.continue_from=", "/no.sif"):
        assert problem in "".join(
            line for line in shown.out.splitlines() if line.startswith("Would be refused now")
        )
    refused(run, launch("run.yaml", "layout.ep=3", *words), "layout.ep=3")


def test_the_estimate_follows_from_flops_and_the_named_rate() -> None:
    run = recipe("mellum2_12b_pretrain_phase2")
    result = estimate(run, world_size=256, tflops=350.0)
    # 17.570 GFLOP per token with windows and MTP. Phase 2 has 2.79T tokens of its own: its first
    # sample is the one after phase 1.
    assert result.flops_per_token == pytest.approx(17.570e9, rel=1e-4)
    assert result.tokens_per_second == pytest.approx(256 * 350e12 / 17.570e9, rel=1e-4)
    assert result.tokens == pytest.approx(2.79e12, rel=1e-4)
    assert result.days == pytest.approx(2.79e12 / (256 * 350e12 / 17.570e9) / 86400, rel=1e-3)


def test_the_estimate_is_marked_as_not_measured(place: Path, run: Run) -> None:
    (place / "gpu.yaml").write_text("account: none\ngpus_per_node: 2\n")
    text = launch("run.yaml", "--profile", "gpu.yaml", "--dry-run").out
    assert "model TFLOP/s a rank of H100 SXM" in text
    assert "Step of " in text
    assert "Not measured" in text
    assert "Memory is not checked: no card is named" in text
    assert "these have enough: h100, h200, b200, a100-80, a100-40, l40s." in text
    (place / "gpu.yaml").write_text("account: none\ngpus_per_node: 2\ngpu: l40s\n")
    text = launch("run.yaml", "--profile", "gpu.yaml", "--dry-run").out
    assert "No estimate of time: there is no rate to assume for l40s" in text
    assert "Memory is not checked" not in text
    given = launch("run.yaml", "--profile", "site.yaml", "--dry-run", "--assumed-tflops", "2").out
    assert "at the given 2 model TFLOP/s a rank" in given
    tokens = 2 * 2e12 / run.architecture.flops_per_token(run.data.sequence_length)
    assert f"{tokens:,.0f} tokens/s" in given


def test_an_array_is_shown_as_one(place: Path) -> None:
    text = launch(
        "run.yaml",
        "--profile",
        "site.yaml",
        "--dry-run",
        "--array",
        "seed=1",
        "--array",
        "seed=2 optimizer.lr=1e-4",
    ).out
    assert "#SBATCH --array=0-1" in text
    assert "2 tasks" in text


def test_rendering_needs_neither_nemo_run_nor_slurm(
    run: Run, place: Path, no_slurm: None, no_nemo_run: None
) -> None:
    result = launch("run.yaml", "--profile", "site.yaml", "--render", "sbatch", "--nodes", "2")
    assert result.code == 0, result
    folder = Path(str(run.checkpoint.output))
    assert result.out == (folder / "job.sbatch").read_text()
    assert result.out.startswith("#!/bin/bash\n")
    assert f"sbatch {folder}/job.sbatch" in result.err
    assert (folder / "logs").is_dir()
    assert read_run(folder / "run.yaml").name == run.name
    # With --dry-run nothing is written, and stdout has the script alone.
    other = launch(
        "run.yaml", "--profile", "site.yaml", "--render", "sbatch", "--dry-run", "--output", "other"
    )
    assert other.err == ""
    assert not (place / "other").exists()


def test_the_code_of_the_git_packager_lies_in_the_run_folder(run: Run, place: Path) -> None:
    (place / "git.yaml").write_text(PROFILE + "packager: git\n")
    shown = launch("run.yaml", "--profile", "git.yaml", "--dry-run")
    assert not Path(str(run.checkpoint.output)).exists()
    written = launch("run.yaml", "--profile", "git.yaml", "--render", "sbatch")
    (folder,) = (Path(str(run.checkpoint.output)) / "code").iterdir()
    assert (folder / "mellum2_megatron/__init__.py").is_file()
    assert f"export PYTHONPATH={folder}" in written.out
    assert written.out in shown.out


# ------------------------------------------------------------------------------
# Refusals
# ------------------------------------------------------------------------------


def test_missing_nemo_run_is_an_error_with_a_fix(
    run: Run, no_nemo_run: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launchers.slurm.require", lambda *_: None)
    fixes = ("make setup-launch", "constraints.txt", "--render sbatch")
    refused(run, launch("run.yaml", "--profile", "site.yaml"), "NeMo-Run", *fixes)
    refused(run, launch("run.yaml", "--executor", "local"), "NeMo-Run", *fixes)


def test_without_slurm(run: Run, no_slurm: None) -> None:
    refused(
        run,
        launch("run.yaml", "--profile", "site.yaml"),
        "sbatch is not on PATH",
        "--render sbatch",
    )
    launch("status", "12").refused("scontrol is not on PATH")
    launch("cancel", "12").refused("scancel is not on PATH")


@pytest.mark.parametrize(
    ("text", "words", "named"),
    [
        (PROFILE.replace("account", "acount"), [], ["acount", "did you mean 'account'"]),
        (PROFILE.replace("account: none\n", ""), [], ["names no account", "set account"]),
        (PROFILE, ["layout.dp=4", "--nodes", "1"], ["layout.dp=4"]),
        (PROFILE, ["layout.ep=3"], ["layout.ep=3"]),
        (
            PROFILE + "container: {image: /no/image.sqsh, runtime: pyxis}\n",
            [],
            ["container.image=/no/image.sqsh"],
        ),
        (PROFILE + "time: 24 hours\n", [], ["time: 24 hours", "no time of Slurm"]),
        (PROFILE, ["checkpoint.output=/dev/null/run"], ["/dev/null/run"]),
        (PROFILE, ["--nproc", "2"], ["--nproc 2", "ranks_per_node"]),
        (PROFILE, ["--executor", "local"], ["--executor local with --profile site.yaml"]),
        (PROFILE, ["--executor", "ssh"], ["--executor ssh"]),
        (PROFILE, ["--render", "pbs"], ["--render pbs"]),
        (PROFILE, ["--array", "seed=1", "--follow"], ["--follow"]),
        (PROFILE, ["--dry-run", "--assumed-tflops", "inf"], ["--assumed-tflops inf", "finite"]),
        (PROFILE, ["--array", "seed='1"], ["--array seed='1", "close the quote"]),
        (PROFILE, ["--array", "sed=1"], ["sed"]),
        (PROFILE, ["sed=1"], ["sed"]),
    ],
)
def test_bad_input(run: Run, place: Path, text: str, words: list[str], named: list[str]) -> None:
    (place / "site.yaml").write_text(text)
    refused(run, launch("run.yaml", "--profile", "site.yaml", *words), *named)


def test_on_this_machine(run: Run, place: Path) -> None:
    """One machine has one node with --nproc ranks; the run's rules hold as on a cluster."""
    shown = launch("run.yaml", "--executor", "local", "--nproc", "4", "--dry-run")
    assert "4 ranks: 1 node of 4 cpu ranks" in shown.out
    assert "#SBATCH" not in shown.out
    refused(run, launch("run.yaml", "--executor", "local", "--nproc", "1"), "on 1 ranks")
    for words in (["--nodes", "2"], ["--time", "10"], ["--array", "seed=1"]):
        refused(run, launch("run.yaml", "--executor", "local", *words), words[0])
    refused(run, launch("run.yaml", "--executor", "local", "--render", "sbatch"), "--render sbatch")


def test_without_a_profile(run: Run, place: Path) -> None:
    refused(run, launch("run.yaml"), "profile", "--executor local")
    (place / "profiles").mkdir()
    (place / "profiles/big.yaml").write_text(PROFILE)
    refused(run, launch("run.yaml", "--executor", "slurm"), "--profile (big)")
    refused(run, launch("run.yaml", "--profile", "bog"), "'bog'", "did you mean 'big'")


def test_a_word_that_is_neither_recipe_nor_command() -> None:
    launch("statsu", "runs/x").refused("'statsu'", "did you mean 'status'")
    launch("mellum2_tiny_pretrian", "--executor", "local").refused(
        "did you mean 'mellum2_tiny_pretrain'"
    )


def test_no_recipe_is_called_like_a_command() -> None:
    from mellum2_megatron.cli.launch import launch_app

    commands = {command.name for command in launch_app.registered_commands}
    assert commands == {"run", "status", "logs", "cancel", "pipeline"}
    assert not commands & set(recipe_names())


@pytest.mark.parametrize("packager", ["shared", "git"])
def test_uncommitted_changes(run: Run, place: Path, packager: str) -> None:
    (place / "site.yaml").write_text(PROFILE + f"packager: {packager}\n")
    changed = place.parent / "code/mellum2_megatron/__init__.py"
    changed.write_text("changed")
    refused(
        run,
        launch("run.yaml", "--profile", "site.yaml"),
        "mellum2_megatron/__init__.py",
        "--allow-dirty",
    )
    result = launch("run.yaml", "--profile", "site.yaml", "--dry-run", "--allow-dirty")
    assert result.code == 0, result
    assert "uncommitted changes" in result.out


@pytest.mark.parametrize("key", ["load", "continue_from"])
def test_a_stage_without_its_predecessor(run: Run, key: str) -> None:
    refused(
        run,
        launch("run.yaml", f"checkpoint.{key}=runs/before", "--profile", "site.yaml"),
        f"checkpoint.{key}=",
    )


def test_logs_without_a_launch(place: Path) -> None:
    launch("logs", "nix").refused("no such folder or job")
    launch("status").refused("nothing was launched")


# ------------------------------------------------------------------------------
# Chains
# ------------------------------------------------------------------------------


def test_overrides_follow_their_stage() -> None:
    words = ["seed=1", "a", "data.path=x", "b", "c", "seed=2"]
    assert split_stages(words) == [
        ("a", ("seed=1", "data.path=x")),
        ("b", ("seed=1",)),
        ("c", ("seed=1", "seed=2")),
    ]


def stages(place: Path, run: Run) -> None:
    checkpoint = dataclasses.replace(run.checkpoint, output=None)
    first = dataclasses.replace(run, name="first", checkpoint=checkpoint)
    start = dataclasses.replace(checkpoint, load="anywhere")
    (place / "first.yaml").write_text(to_yaml(first))
    (place / "second.yaml").write_text(
        to_yaml(dataclasses.replace(first, name="second", checkpoint=start))
    )


def test_a_pipeline_wires_each_stage_to_the_one_before(
    place: Path, run: Run, no_slurm: None, no_nemo_run: None
) -> None:
    stages(place, run)
    words = [
        "pipeline",
        "first.yaml",
        "second.yaml",
        "seed=5",
        "--profile",
        "site.yaml",
        "--output",
        "chain",
    ]
    shown = launch(*words, "--dry-run")
    assert shown.code == 0, shown
    assert not (place / "chain").exists()
    written = launch(*words, "--render", "sbatch")
    assert written.code == 0, written
    second = read_run(place / "chain/second/run.yaml")
    assert second.checkpoint.load == str(place / "chain/first")
    assert (second.seed, read_run(place / "chain/first/run.yaml").seed) == (5, run.seed)
    assert (place / "chain/second/job.sbatch").read_text() in written.out
    assert "--dependency=afterok:JOB" in written.err.splitlines()[-1]


def test_a_chain_that_does_not_fit_is_refused(place: Path, run: Run) -> None:
    stages(place, run)
    launch("pipeline", "second.yaml", "first.yaml", "--profile", "site.yaml").refused("first")
    launch("pipeline", "first.yaml", "first.yaml", "--profile", "site.yaml").refused("twice")
    launch("pipeline", "seed=1", "--profile", "site.yaml").refused("no stages")
    launch("pipeline", "second.yaml", "--profile", "site.yaml").refused("checkpoint.load=")
    (place / "here.yaml").write_text("executor: local\n")
    launch("pipeline", "first.yaml", "--profile", "here.yaml").refused("here.yaml")
