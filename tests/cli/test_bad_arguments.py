"""Invalid names and values on the command line: one message, exit code 2, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.runner import BIG, TINY, mellum2, process, snapshot


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
        (["architecture.num_experts_per_tok=9"], ["architecture.num_experts_per_tok=9"]),
        (["layout.ep=3"], ["layout.ep=3", "num_experts (4)", "layout.ep=2 or 4"]),
        (
            ["layout.tp=3", "layout.sp=true"],
            ["layout.tp=3", "num_attention_heads (4)", "layout.tp=2"],
        ),
        (["layout.cp=3"], ["layout.cp=3", "data.sequence_length=64", "multiple of 6"]),
        (["--nproc", "3"], ["3 ranks", "ep * etp * pp = 2", "start 2 or 4 ranks"]),
        (["data.sequence_length=4096"], ["data.sequence_length=4096", "max_position_embeddings"]),
        (["--device", "gpu"], ["--device gpu", "auto, cpu and cuda"]),
        (["precision.compute=fp8"], ["precision.compute=fp8", "Transformer Engine"]),
        (["architecture.vocab_size=100"], ["360 entries", "architecture.vocab_size is 100"]),
        (["data.tokenizer=nowhere"], ["tokenizer nowhere", "tokenizer.json"]),
        (["data.path=nowhere"], ["data.path=nowhere", "mellum2 data prepare"]),
        (["data.train=[[1.0,nowhere]]"], ["nowhere.bin does not exist"]),
        (["checkpoint.load=nowhere"], ["nowhere", "there is no checkpoint of it"]),
    ],
)
def test_a_run_that_cannot_work(
    words: list[str], named: list[str], small_run: list[str], tmp_path: Path
) -> None:
    mellum2("train", *small_run, "--output", tmp_path / "run", *words).refused(*named)
    assert snapshot(tmp_path) == {}


def test_cuda_without_a_gpu_is_refused(small_run: list[str], tmp_path: Path) -> None:
    mellum2("train", *small_run, "--device", "cuda", "--output", tmp_path / "run").refused(
        "--device cuda", "no GPU"
    )
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: "a: [1", ["line 1", "not YAML"]),
        (lambda text: "- 1", ["mapping"]),
        (lambda text: "", ["mapping"]),
        (lambda text: text.replace("layout:", "layuot:"), ["layuot", "did you mean 'layout'"]),
        (lambda text: text.replace("  ep: 2", "  ep: two"), ["layout.ep=two", "whole number"]),
        (
            lambda text: text.replace("  num_experts_per_tok: ", "  num_experts_per_tok: 9"),
            ["architecture.num_experts_per_tok=9"],
        ),
        (lambda text: text.replace("  lr: ", "  lrr: "), ["optimizer.lrr", "'optimizer.lr'"]),
        (lambda text: text.partition("data:")[0], ["data is missing", "add data"]),
        (lambda text: text + "seed: 7\n", ["seed is given twice"]),
        (lambda text: '!!python/object/apply:os.mkdir ["owned"]', ["not YAML"]),
    ],
)
def test_an_invalid_run_file(
    change: Callable[[str], str], named: list[str], tmp_path: Path
) -> None:
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
        (["info", "--hf-path", "nowhere"], ["nowhere", "no such folder"]),
        (["info", "mellum2-tiny", "--sequence-length", "0"], ["sequence_length=0"]),
        (
            ["verify", "--megatron-path", "nowhere", "--hf-path", "nowhere"],
            ["nowhere", "no such folder"],
        ),
        (
            ["convert", "import", "--hf-path", "nowhere", "--megatron-path", "x"],
            ["nowhere", "no such folder"],
        ),
        (["convert", "roundtrip", "--hf-path", "nowhere"], ["nowhere", "no such folder"]),
        (["generate", "--hf-path", "nowhere", "--prompt", "x"], ["nowhere", "no such folder"]),
        (
            ["data", "prepare", "--output", "x", "--input", "nowhere"],
            ["--input nowhere", "no such file"],
        ),
        (["data", "prepare", "--output", "x", "--max-megabytes", "inf"], ["--max-megabytes inf"]),
        (["data", "prepare", "--output", "x", "--max-megabytes", "1e-9"], ["less than a byte"]),
    ],
)
def test_unknown_names(
    words: list[str], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mellum2(*words).refused(*named)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    "words",
    [["train", TINY, "--output", ""], ["train", TINY, "--output="], ["info", "--hf-path", ""]],
)
def test_an_empty_option_is_not_the_current_folder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mellum2(*words).refused(words[2 if len(words) > 2 else 1].rstrip("="), "is empty")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("logging.wandb_project=team/mellum:v2", "W&B takes"),
        ("seed=0", "seed=0"),
        ("optimizer.adam_eps=nan", "finite"),
        ("data.path=a\nb", "one line of text"),
        ("data.path=/etc/passwd/x", "/etc/passwd is a file"),
        ("data.tokenizer=/etc/passwd", "/etc/passwd is a file"),
        ("checkpoint.load=-x", "write ./-x"),
    ],
)
def test_every_command_refuses_what_a_rank_would(word: str, named: str, tmp_path: Path) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text("account: nlp\n")
    launch = ["launch", "run", TINY, word, "--profile", str(profile)]
    run = ["--output", tmp_path / "run", "--device", "cpu"]
    for words in (
        ["train", TINY, word, *run],
        ["train", TINY, word, *run, "--dry-run"],
        [*launch, "--render", "sbatch"],
        [*launch, "--dry-run"],
    ):
        result = mellum2(*words)
        assert (result.code, result.out) == (2, ""), words
        assert named in result.err, words
    checked = mellum2("doctor", TINY, word)
    assert checked.code == 2
    assert named.split()[0] in checked.out
    assert snapshot(tmp_path).keys() == {"site.yaml"}


def test_usage_errors_end_with_2_and_name_the_option() -> None:
    for words, named in (
        (["trian"], "trian"),
        (["train"], "RECIPE"),
        (["train", TINY, "--nproc", "0"], "--nproc 0: it must be"),
        (["train", TINY, "--outputt", "x"], "--outputt"),
        (["score", "--tokens", "x"], "--out"),
        (["data", "run", "x", "--workers=zero"], "--workers zero"),
        (["data", "inspect", "x", "--split", "test"], "--split test: 'test' is not one of"),
        (["data", "inspect", "x", "y"], "unexpected extra argument"),
        (["data", "run", "x", "--stage"], "--stage"),
        (["data", "where", "x", "y"], "step"),
        (
            ["generate", "--hf-path", "x", "--prompt", "x", "--max-new-tokens", "0"],
            "--max-new-tokens",
        ),
    ):
        result = mellum2(*words)
        result.refused(named)
        assert result.err.count("\n") == 1, result


def test_a_group_without_a_command_shows_its_help() -> None:
    result = mellum2("data")
    assert (result.code, result.err) == (2, "")
    assert "Make training data." in result.out


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
