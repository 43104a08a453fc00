"""The command line as a user meets it: what it prints, what it refuses in one message, and what it leaves behind."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mellum2_megatron import cli
from mellum2_megatron.architecture import PRESETS
from mellum2_megatron.checkpoint_folder import TRACKER_FILE
from mellum2_megatron.data.prepare import load_prepared
from mellum2_megatron.overrides import apply_overrides
from mellum2_megatron.recipes import recipe
from mellum2_megatron.run import from_yaml
from mellum2_megatron.run_folder import write_run_folder
from tests.conversion.folders import load_tensors, save_tensors, write_folder
from tests.data.conftest import python_like
from tests.distributed import REPOSITORY

TINY = "mellum2_tiny_pretrain"
BIG = "mellum2_12b_pretrain_phase1"
SMALL = [
    "architecture.vocab_size=384",
    "architecture.hidden_size=64",
    "architecture.head_dim=16",
    "architecture.moe_intermediate_size=32",
    "architecture.num_experts=4",
    "architecture.sliding_window=16",
    "data.sequence_length=64",
    "schedule.batch_schedule=[[0,4]]",
    "schedule.micro_batch_size=2",
    "schedule.warmup_samples=4",
    "schedule.decay_samples=4",
    "schedule.train_samples=12",
    "logging.log_interval=1",
    "logging.eval_iterations=0",
    "checkpoint.save_interval=1",
]
PREPARE = ["--vocab-size", "360", "--workers", "1", "--valid-fraction", "0.2"]


@dataclasses.dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, *named: str, code: int = 2) -> None:
        """It must have ended with one message that names value, rule and fix, and nothing else."""
        assert self.code == code, self
        assert self.out == "", self
        assert self.err.startswith("error: "), self
        assert self.err.count("error:") == 1, self
        assert "Traceback" not in self.err, self
        assert " Fix: " in self.err, self
        for name in named:
            assert name in self.err, (name, self.err)


def mellum2(*words: str | Path) -> Result:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    levels = {each: each.level for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(builtins, "print", builtins.print)  # `quiet_upstream` is for the rest of a process
        patch.setattr(sys, "argv", ["mellum2", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    for logger, level in levels.items():
        logger.setLevel(level)
    return Result(code, out.getvalue(), err.getvalue())


def process(*words: str | Path, module: bool = False, **options: Any) -> Result:
    """Run the installed command, or the module, in a process of its own."""
    script = [str(Path(sys.executable).with_name("mellum2"))]
    command = [sys.executable, "-m", "mellum2_megatron"] if module else script
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300, **options
    )
    return Result(done.returncode, done.stdout, done.stderr)


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder, with the hash of what it holds."""
    return {
        str(path.relative_to(folder)): "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(autouse=True)
def _nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: Any, **__: Any) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("launchers.local.run_ranks", launch)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for seed in range(40):
        (folder / f"module_{seed}.py").write_text(python_like(seed))
    return folder


@pytest.fixture(scope="module")
def prepare_result(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """`data prepare` in a process of its own: the folder, and what the command said."""
    folder = tmp_path_factory.mktemp("data") / "corpus"
    return folder, process("data", "prepare", "--output", folder, "--input", texts, *PREPARE)


@pytest.fixture(scope="module")
def corpus(prepare_result: tuple[Path, Result]) -> Path:
    return prepare_result[0]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def checkpoint(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron") / "model"
    result = mellum2("convert", "import", "--hf-path", hf_folder, "--megatron-path", folder)
    assert result.code == 0, result
    return folder


@pytest.fixture
def small_run(corpus: Path) -> list[str]:
    """Words after `train` of a run that would work."""
    return [TINY, *SMALL, f"data.path={corpus}", "--device", "cpu"]


@pytest.fixture
def run_folder(small_run: list[str], tmp_path: Path) -> Path:
    """What a run has left that was trained to step 100: every file but the weights."""
    folder = tmp_path / "run"
    overrides = [*small_run[1:-2], f"checkpoint.output={folder}"]
    write_run_folder(apply_overrides(recipe(TINY), overrides))
    (folder / "iter_0000100").mkdir()
    (folder / "iter_0000100" / "metadata.json").write_text("{}")
    (folder / TRACKER_FILE).write_text("100")
    return folder


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Make a file system of its own, with the mount options given (`size=1m`)."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk, where mounting is allowed at all")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# -- What works -------------------------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    version = process("--version")
    assert (version.code, version.err) == (0, "")
    assert version.out.startswith("mellum2-megatron 0.")
    assert process("--version", module=True).out == version.out
    for command in ([], ["train"], ["info"], ["doctor"], ["score"], ["generate"], ["verify"], ["quickstart"]):
        assert "Usage: mellum2" in mellum2(*command, "--help").out
    for command in (["convert", "import"], ["convert", "export"], ["convert", "roundtrip"], ["data", "prepare"]):
        shown = mellum2(*command, "--help")
        assert shown.code == 0
        assert shown.err == ""


def test_planning_imports_no_heavy_library() -> None:
    """A command that computes nothing answers at once: torch alone takes seconds to import."""
    program = f"""
import sys
from mellum2_megatron.cli import main
for words in (["recipes"], ["info", "mellum2-12b"], ["info", "{TINY}", "layout.ep=4"], ["doctor", "--help"],
              ["train", "{BIG}", "--nproc", "256", "--dry-run"], ["train", "{TINY}", "--dry-run"], ["train", "none"]):
    sys.argv = ["mellum2", *words]
    try:
        main()
    except SystemExit:
        pass
    heavy = {{"torch", "transformers", "megatron", "tokenizers", "numpy", "safetensors"}} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def test_recipes_are_listed() -> None:
    lines = mellum2("recipes").out.splitlines()
    assert {line.split()[0] for line in lines} >= {TINY, BIG}
    assert all(len(line.split()) > 5 for line in lines)


def test_info_of_the_released_model_states_its_exact_counts() -> None:
    shown = mellum2("info", "mellum2-12b")
    assert shown.code == 0
    for count in ("12,149,923,072", "12,578,294,528", "2,439,060,736", "2,520,615,680", "17.570 GFLOP"):
        assert count in shown.out


def test_info_agrees_with_itself_whatever_it_is_given(hf_folder: Path) -> None:
    preset = json.loads(mellum2("info", "mellum2-tiny", "--json").out)
    of_recipe = json.loads(mellum2("info", TINY, "--json").out)
    assert of_recipe.pop("memory_per_rank") is not None
    assert preset.pop("memory_per_rank") is None
    assert of_recipe["parameters"] == preset["parameters"]
    folder = json.loads(mellum2("info", "--hf-path", hf_folder, "--json").out)
    tensors = load_tensors(hf_folder)
    assert folder["tensors"]["total_with_mtp"] == len(tensors)
    assert folder["parameters"]["total_with_mtp"] == sum(tensor.numel() for tensor in tensors.values())


def test_dry_run_is_a_run_file(small_run: list[str], tmp_path: Path) -> None:
    """What `--dry-run` prints can be given to `train`, and then means the same run; overrides come anywhere."""
    output = tmp_path / "run"
    shown = mellum2("train", *small_run, "--dry-run", "--output", output, "optimizer.lr=1e-3")
    assert (shown.code, shown.err) == (0, "")
    assert not output.exists()
    run = from_yaml(shown.out)
    assert (run.optimizer.lr, run.architecture.num_experts, run.checkpoint.output) == (1e-3, 4, str(output))
    file = tmp_path / "run.yaml"
    file.write_text(shown.out)
    assert mellum2("train", file, "--device", "cpu", "--dry-run").out == shown.out
    changed = mellum2("train", "--dry-run", file, "optimizer.lr=2e-3", "--device", "cpu", "layout.ep=1")
    assert (from_yaml(changed.out).optimizer.lr, from_yaml(changed.out).layout.ep) == (2e-3, 1)
    assert "# 1 cpu rank(s)" in changed.out
    assert from_yaml(mellum2("train", TINY, "--dry-run").out).checkpoint.output == f"runs/{TINY}"


def test_prepare_says_one_line(prepare_result: tuple[Path, Result]) -> None:
    folder, result = prepare_result
    assert (result.code, result.err) == (0, "")
    tokens = load_prepared(folder).splits["train"].tokens
    assert result.out == f"wrote {folder}: {tokens:,} training tokens\n"


def test_conversion_and_scoring_agree(hf_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Import, export, round trip, verify and score on a folder that transformers wrote."""
    assert mellum2("convert", "export", "--megatron-path", checkpoint, "--hf-path", tmp_path / "back").code == 0
    before, after = load_tensors(hf_folder), load_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "every byte the same" in mellum2("convert", "roundtrip", "--hf-path", hf_folder).out
    verified = mellum2("verify", "--megatron-path", checkpoint, "--hf-path", tmp_path / "back")
    assert verified.code == 0
    assert "agree" in verified.out
    np.save(tmp_path / "tokens.npy", np.arange(60, dtype=np.uint16).reshape(3, 20))
    logits = {}
    for option, folder in (("--megatron-path", checkpoint / "release"), ("--hf-path", hf_folder)):
        out = tmp_path / f"{option.strip('-')}.npz"
        assert mellum2("score", "--tokens", tmp_path / "tokens.npy", "--out", out, option, folder).code == 0
        logits[option] = np.load(out)
    for name in ("logits", "mtp_logits"):
        ours, theirs = (logits[option][name] for option in logits)
        assert ours.shape == (3, 20, 96)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours[:, :-1], theirs[:, :-1], atol=1e-4)


def test_verify_ends_with_1_when_logits_differ(hf_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(hf_folder, tmp_path / "other"))
    tensors = load_tensors(other)
    tensors["lm_head.weight"][7] += 0.25
    save_tensors(other, tensors)
    result = mellum2("verify", "--megatron-path", checkpoint, "--hf-path", other)
    assert result.code == 1
    assert "DIFFER" in result.out


# -- Bad input: names and values --------------------------------------------------------------------------------------


def test_the_installed_command_refuses_in_one_line() -> None:
    for module in (False, True):
        result = process("train", "mellum2_tiny_pretrian", module=module)
        result.refused("'mellum2_tiny_pretrian'", f"did you mean '{TINY}'")
        assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["layout.eq=2"], ["layout.eq", "did you mean 'layout.ep'"]),
        (["optimiser.lr=1"], ["there is no key 'optimiser.lr'", "'optimizer.lr'"]),
        (["layout.ep=two"], ["layout.ep=two", "whole number"]),
        (["layout.ep"], ["KEY=VALUE"]),
        (["layout.ep=3"], ["layout.ep=3", "num_experts (4)", "layout.ep=2 or 4"]),
        (["layout.tp=3", "layout.sp=true"], ["layout.tp=3", "num_attention_heads (4)", "layout.tp=2"]),
        (["layout.cp=3"], ["layout.cp=3", "data.sequence_length=64", "multiple of 6"]),
        (["--nproc", "3"], ["3 ranks", "ep * etp * pp = 2", "start 2 or 4 ranks"]),
        (["data.sequence_length=4096"], ["data.sequence_length=4096", "max_position_embeddings"]),
        (["--device", "gpu"], ["--device gpu", "auto, cpu and cuda"]),
        (["precision.compute=fp8"], ["precision.compute=fp8", "Transformer Engine"]),
        (["architecture.vocab_size=100"], ["360 entries", "architecture.vocab_size is 100"]),
        (["data.tokenizer=nowhere"], ["tokenizer nowhere", "tokenizer.json"]),
        (["data.path=nowhere"], ["data.path=nowhere", "mellum2 data prepare"]),
        (["data.train=[[1.0,nowhere]]"], ["nowhere.bin does not exist"]),
        (["checkpoint.load=nowhere"], ["nowhere", "checkpoint folder"]),
    ],
)
def test_a_run_that_cannot_work(words: list[str], named: list[str], small_run: list[str], tmp_path: Path) -> None:
    mellum2("train", *small_run, "--output", tmp_path / "run", *words).refused(*named)
    assert snapshot(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(small_run: list[str], tmp_path: Path) -> None:
    mellum2("train", *small_run, "--device", "cuda", "--output", tmp_path / "run").refused("--device cuda", "no GPU")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: "a: [1", ["line 1", "not YAML"]),
        (lambda text: "- 1", ["mapping"]),
        (lambda text: "", ["mapping"]),
        (lambda text: text.replace("layout:", "layuot:"), ["layuot", "did you mean 'layout'"]),
        (lambda text: text.replace("  ep: 2", "  ep: two"), ["layout.ep='two'", "whole number"]),
        (lambda text: text.replace("  lr: ", "  lrr: "), ["optimizer.lrr", "'optimizer.lr'"]),
        (lambda text: text.partition("data:")[0], ["data is missing", "add data"]),
        (lambda text: text + "seed: 7\n", ["seed is given twice"]),
        (lambda text: '!!python/object/apply:os.mkdir ["owned"]', ["not YAML"]),
    ],
)
def test_a_run_file_that_is_none(change: Callable[[str], str], named: list[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(change(mellum2("train", TINY, "--dry-run").out))
    before = snapshot(tmp_path)
    mellum2("train", file).refused(str(file), *named)
    assert snapshot(tmp_path) == before
    assert not Path("owned").exists()


def test_a_run_file_that_cannot_be_read(tmp_path: Path) -> None:
    mellum2("train", tmp_path / "none.yaml").refused("none.yaml", "cannot be read")
    (tmp_path / "folder.yaml").mkdir()
    mellum2("train", tmp_path / "folder.yaml").refused("folder.yaml", "cannot be read")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    mellum2("train", tmp_path / "binary.yaml").refused("binary.yaml", "cannot be read")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["info"], ["describes one thing"]),
        (["info", "mellum2-12c"], ["'mellum2-12c'", "did you mean 'mellum2-12b'"]),
        (["info", "mellum2-12b", "layout.ep=2"], ["overrides change a recipe"]),
        (["info", BIG, "layout.ep=7"], ["layout.ep=7", "num_experts (64)", "layout.ep=4 or 8"]),
        (["info", BIG, "--nproc", "24"], ["24 ranks", "256"]),
        (["info", "--hf-path", "nowhere"], ["nowhere/config.json"]),
        (["info", "mellum2-tiny", "--sequence-length", "0"], ["sequence_length=0"]),
        (["verify", "--megatron-path", "nowhere", "--hf-path", "nowhere"], ["nowhere", "checkpoint folder"]),
        (["convert", "import", "--hf-path", "nowhere", "--megatron-path", "x"], ["nowhere", "must be a folder"]),
        (["convert", "roundtrip", "--hf-path", "nowhere"], ["nowhere", "must be a folder"]),
        (["generate", "--hf-path", "nowhere", "--prompt", "x"], ["nowhere", "must be a folder"]),
        (["data", "prepare", "--output", "x", "--input", "nowhere"], ["--input nowhere", "no such file"]),
        (["data", "prepare", "--output", "x", "--max-megabytes", "inf"], ["--max-megabytes inf"]),
    ],
)
def test_names_of_nothing(words: list[str], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mellum2(*words).refused(*named)
    assert snapshot(tmp_path) == {}


def test_usage_errors_end_with_2_and_name_the_option() -> None:
    for words, named in (
        (["trian"], "trian"),
        (["train"], "RECIPE"),
        (["train", TINY, "--nproc", "0"], "--nproc"),
        (["train", TINY, "--outputt", "x"], "--outputt"),
        (["score", "--tokens", "x"], "--out"),
        (["generate", "--hf-path", "x", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
    ):
        result = mellum2(*words)
        assert (result.code, result.out) == (2, "")
        assert named in result.err
        assert "Traceback" not in result.err


def test_doctor_names_what_is_broken(small_run: list[str]) -> None:
    good = mellum2("doctor", *small_run)
    assert good.code == 0, good
    assert "breaks no rule" in good.out
    bad = mellum2("doctor", *small_run, "layout.ep=3")
    assert bad.code == 2
    assert "layout-fits" in bad.out
    unknown = mellum2("doctor", "mellum2_tiny")
    assert unknown.code == 2
    assert TINY in unknown.out


# -- Bad input: files -------------------------------------------------------------------------------------------------


def _missing(folder: Path) -> None:
    tensors = load_tensors(folder)
    del tensors["model.norm.weight"]
    save_tensors(folder, tensors)


def _extra(folder: Path) -> None:
    save_tensors(folder, {**load_tensors(folder), "model.extra.weight": torch.zeros(2, dtype=torch.bfloat16)})


def _misshapen(folder: Path) -> None:
    save_tensors(folder, {**load_tensors(folder), "lm_head.weight": torch.zeros(95, 24, dtype=torch.bfloat16)})


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _other_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_moe"}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_missing, ["model.norm.weight", "missing"]),
        (_extra, ["model.extra.weight", "not part of the model"]),
        (_misshapen, ["lm_head.weight [95, 24]", "[96, 24]"]),
        (_truncated, ["model.safetensors"]),
        (_other_model, ["model_type='qwen3_moe'"]),
    ],
)
def test_a_folder_that_is_no_mellum2(
    damage: Callable[[Path], None], named: list[str], hf_folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(hf_folder, tmp_path / "hf"))
    damage(folder)
    np.save(tmp_path / "tokens.npy", np.ones((1, 4), dtype=np.int64))
    before = snapshot(tmp_path)
    target = ["--megatron-path", tmp_path / "target"]
    mellum2("convert", "import", "--hf-path", folder, *target).refused(*named)
    mellum2("convert", "roundtrip", "--hf-path", folder).refused(*named)
    mellum2("verify", "--megatron-path", checkpoint, "--hf-path", folder).refused(*named)
    mellum2("score", "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "out.npz", "--hf-path", folder).refused(
        *named
    )
    assert snapshot(tmp_path) == before


def test_checkpoints_of_another_architecture(
    checkpoint: Path, run_folder: Path, small_run: list[str], tmp_path: Path
) -> None:
    foreign = Path(shutil.copytree(checkpoint, tmp_path / "foreign"))
    (foreign / "architecture.json").write_text(json.dumps(PRESETS["mellum2-tiny"].to_dict()))
    before = snapshot(tmp_path)
    mellum2("convert", "export", "--megatron-path", foreign, "--hf-path", tmp_path / "hf").refused("architecture.json")
    mellum2("train", *small_run, "architecture.num_experts=8", "--output", run_folder).refused(
        "num_experts: 4 there, 8 here", "--output"
    )
    load = ["--output", tmp_path / "new", f"checkpoint.load={run_folder}"]
    mellum2("train", *small_run, "architecture.num_experts=8", *load).refused("num_experts: 4 there, 8 here")
    mellum2("train", *small_run, "optimizer.name=adam", "--output", run_folder).refused("optimizer.name=adam", "muon")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("tracker", ["", "99", "soon"])
def test_a_tracker_that_points_nowhere(tracker: str, run_folder: Path, small_run: list[str]) -> None:
    """Megatron would start over without a word."""
    (run_folder / TRACKER_FILE).write_text(tracker)
    before = snapshot(run_folder)
    mellum2("train", *small_run, "--output", run_folder).refused(TRACKER_FILE)
    assert snapshot(run_folder) == before


def _tokens_files(folder: Path) -> dict[str, str]:
    """Name of a bad file of tokens, and what the message must say of it."""
    good = np.ones((2, 6), dtype=np.int64)
    np.save(folder / "good.npy", good)
    np.save(folder / "float.npy", good.astype(np.float32))
    np.save(folder / "flat.npy", good[0])
    np.save(folder / "none.npy", good[:0])
    np.save(folder / "large.npy", good * 96)
    np.save(folder / "negative.npy", -good)
    np.save(folder / "pickle.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    np.savez(folder / "archive.npz", good)
    (folder / "text.npy").write_text("1 2 3")
    (folder / "cut.npy").write_bytes((folder / "good.npy").read_bytes()[:-8])
    (folder / "folder.npy").mkdir()
    return {
        "nowhere.npy": "No such file",
        "float.npy": "float32",
        "flat.npy": "(6,)",
        "none.npy": "(0, 6)",
        "large.npy": "token id 96",
        "negative.npy": "token id -1",
        "pickle.npy": "pickle",
        "archive.npz": "archive.npz",
        "text.npy": "text.npy",
        "cut.npy": "cut.npy",
        "folder.npy": "folder.npy",
    }


def test_tokens_that_are_none(hf_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    files = _tokens_files(tmp_path)
    before = snapshot(tmp_path)
    for name, named in files.items():
        for model in (["--hf-path", hf_folder], ["--megatron-path", checkpoint]):
            words = ["score", "--tokens", tmp_path / name, "--out", tmp_path / "out.npz", *model]
            mellum2(*words).refused(named)
    assert snapshot(tmp_path) == before


def test_score_takes_one_checkpoint_and_writes_one_file(hf_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.ones((1, 4), dtype=np.int64))
    before = snapshot(tmp_path)
    words = ["score", "--tokens", tokens, "--out"]
    one = "give either --megatron-path or --hf-path"
    mellum2(*words, tmp_path / "out.npz").refused(one)
    mellum2(*words, tmp_path / "out.npz", "--hf-path", hf_folder, "--megatron-path", checkpoint).refused(one)
    mellum2(*words, tmp_path, "--hf-path", hf_folder).refused("--out", "is a folder")
    mellum2(*words, tokens / "out.npz", "--hf-path", hf_folder).refused("is a file, not a folder")
    mellum2(*words, tokens, "--hf-path", hf_folder).refused("is the file of tokens")
    assert snapshot(tmp_path) == before


# -- Targets ----------------------------------------------------------------------------------------------------------


def test_targets_that_are_taken(
    hf_folder: Path, checkpoint: Path, texts: Path, small_run: list[str], run_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("kept")
    before = snapshot(tmp_path)
    importing = ["convert", "import", "--hf-path", hf_folder, "--megatron-path"]
    exporting = ["convert", "export", "--megatron-path", checkpoint, "--hf-path"]
    preparing = ["data", "prepare", "--input", texts, "--output"]
    for command in (importing, exporting, preparing):
        mellum2(*command, tmp_path / "file").refused("is a file")
        mellum2(*command, tmp_path / "file" / "inside").refused("is a file, not a folder")
        mellum2(*command, tmp_path / "mine").refused("exists and is not empty", "--overwrite")
        mellum2(*command, tmp_path / "mine", "--overwrite").refused("mine")
        mellum2(*command, run_folder, "--overwrite").refused("run")
    mellum2(*importing, hf_folder, "--overwrite").refused("source")
    mellum2("train", *small_run, "--output", tmp_path / "file").refused("is a file")
    mellum2("train", *small_run, "--output", tmp_path / "file" / "inside").refused("is a file, not a folder")
    mellum2("train", *small_run, "--output", tmp_path / "new", f"data.cache={tmp_path}/file").refused("data.cache")
    assert snapshot(tmp_path) == before


def test_a_disk_that_cannot_be_written(
    mounted: Callable[[str], Path], hf_folder: Path, small_run: list[str], texts: Path, tmp_path: Path
) -> None:
    """A read-only file system, which stops even root."""
    disk = mounted("ro")
    np.save(tmp_path / "tokens.npy", np.ones((1, 4), dtype=np.int64))
    for words in (
        ["train", *small_run, "--output", disk / "run"],
        ["convert", "import", "--hf-path", hf_folder, "--megatron-path", disk / "checkpoint"],
        ["data", "prepare", "--input", texts, "--output", disk / "corpus"],
        ["score", "--tokens", tmp_path / "tokens.npy", "--hf-path", hf_folder, "--out", disk / "out.npz"],
    ):
        mellum2(*words).refused(str(disk), "not writable")


# -- Full disks -------------------------------------------------------------------------------------------------------


def test_a_full_disk(
    mounted: Callable[[str], Path],
    hf_folder: Path,
    checkpoint: Path,
    texts: Path,
    small_run: list[str],
    tmp_path: Path,
) -> None:
    disk = mounted("size=64k")
    np.save(tmp_path / "tokens.npy", np.ones((8, 40), dtype=np.int64))
    (disk / "kept").write_text("kept")
    before = snapshot(disk)
    for code, words in (
        (2, ["train", *small_run, "--output", disk / "run"]),  # not even one checkpoint would fit
        (1, ["convert", "import", "--hf-path", hf_folder, "--megatron-path", disk / "checkpoint"]),
        (1, ["convert", "export", "--megatron-path", checkpoint, "--hf-path", disk / "hf"]),
        (1, ["data", "prepare", "--input", texts, "--output", disk / "x", *PREPARE]),
        (1, ["score", "--tokens", tmp_path / "tokens.npy", "--hf-path", hf_folder, "--out", disk / "out.npz"]),
    ):
        mellum2(*words).refused(str(disk), code=code)
        assert snapshot(disk) == before, words


@pytest.mark.distributed
def test_a_disk_that_fills_up_while_training(
    mounted: Callable[[str], Path], corpus: Path, small_run: list[str], tmp_path: Path
) -> None:
    """Real ranks: the checkpoint that did not fit is gone, the earlier one is whole and is what a resume would load."""
    disk = mounted("size=5m")  # a checkpoint takes 3.5 MB
    file = tmp_path / "run.yaml"
    file.write_text(mellum2("train", *small_run, "--dry-run", "--output", disk / "run").out)
    result = process("train", file, "--device", "cpu", "--nproc", "2")
    assert result.code == 1, result
    assert "step 1/3" in result.out
    message = result.err.splitlines()
    assert len(message) == 1, result.err
    assert f"the disk of {disk / 'run'} is full" in message[0]
    assert "Fix: free space" in message[0]
    run = disk / "run"
    assert (run / TRACKER_FILE).read_text() == "1"
    assert [path.name for path in run.glob("iter_*")] == ["iter_0000001"]
    assert not list(run.rglob("*.partial"))
    exported = mellum2("convert", "export", "--megatron-path", run, "--hf-path", tmp_path / "hf")
    assert exported.code == 0, exported
    mellum2("train", file, "--device", "cpu").refused("MB free", "free space")
    assert (run / TRACKER_FILE).read_text() == "1"
