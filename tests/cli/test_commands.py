"""Commands that succeed: output and files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.text import Text

from conversion.convert import import_hf
from conversion.release.check_release import MIN_ACCEPTANCE
from conversion.release.members import MEMBERS
from mellum2_megatron.cli.app import app, command_line
from mellum2_megatron.config import from_yaml
from mellum2_megatron.data.corpus.discovery import INSTALLED_FILE_LIMIT
from mellum2_megatron.data.corpus.sources import TEXT_KEYS
from mellum2_megatron.data.prepare import DEFAULT_MAX_BYTES
from mellum2_megatron.data.prepared_folder import load_prepared
from tests import REPOSITORY
from tests.cli.runner import BIG, TINY, Result, mellum2, process
from tests.conversion.folders import load_tensors, save_tensors
from tests.conversion.releases import write_model


def test_version_and_help() -> None:
    version = process("--version")
    assert (version.code, version.err) == (0, "")
    assert version.out.startswith("mellum2-megatron 0.")
    assert process("--version", module=True).out == version.out
    for command in (
        [],
        ["train"],
        ["info"],
        ["doctor"],
        ["score"],
        ["generate"],
        ["verify"],
        ["quickstart"],
    ):
        assert "Usage: mellum2" in mellum2(*command, "--help").out
    for command in (
        ["convert", "import"],
        ["convert", "export"],
        ["convert", "roundtrip"],
        ["data", "prepare"],
    ):
        shown = mellum2(*command, "--help")
        assert shown.code == 0
        assert shown.err == ""


def _commands(command: Any, name: str = "mellum2") -> Iterator[tuple[str, Any]]:
    """Yield every command below `command` with its full name."""
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from _commands(below, f"{name} {word}")


def test_help_texts_are_printed_unchanged() -> None:
    """rich takes square brackets for markup, and typer keeps a summary's line breaks."""
    names = []
    written = _commands(typer.main.get_command(app))
    for (name, command), (_, printed) in zip(written, _commands(command_line()), strict=True):
        names.append(name)
        for source, shown in zip(
            (command, *command.params), (printed, *printed.params), strict=True
        ):
            text = getattr(source, "help", None)
            assert not text or Text.from_markup(shown.help).plain == text, (name, text)
        assert command.help, name
        assert "\n" not in command.help.partition("\n\n")[0], name
    assert len(names) > 20


def test_help_states_the_defaults_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shown = mellum2("data", "prepare", "--help").out
    assert f"default: {DEFAULT_MAX_BYTES >> 20} MiB" in shown
    assert f"({INSTALLED_FILE_LIMIT >> 10} KiB)" in shown
    assert all(key in shown for key in TEXT_KEYS)
    for command in ("release", "check-release"):
        shown = mellum2(command, "--help").out
        assert all(member in shown for member in MEMBERS)
        assert f"[default: {MIN_ACCEPTANCE}]" in shown


def test_planning_imports_no_heavy_library() -> None:
    """A command that computes nothing answers at once: torch alone takes seconds to import."""
    program = f"""
import sys
from mellum2_megatron.cli import main
for words in (
    ["recipes"],
    ["info", "mellum2-12b"],
    ["info", "{TINY}", "layout.ep=4"],
    ["doctor", "--help"],
    ["train", "{BIG}", "--nproc", "256", "--dry-run"],
    ["train", "{TINY}", "--dry-run"],
    ["train", "none"],
):
    sys.argv = ["mellum2", *words]
    try:
        main()
    except SystemExit:
        pass
    heavy = {{"torch", "transformers", "megatron", "tokenizers", "numpy", "safetensors"}}
    loaded = heavy & set(sys.modules)
    assert not loaded, (words, loaded)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr


def test_recipes_are_listed() -> None:
    lines = mellum2("recipes").out.splitlines()
    assert {line.split()[0] for line in lines} >= {TINY, BIG}
    assert all(len(line.split()) > 5 for line in lines)


def test_info_of_the_released_model_states_its_exact_counts() -> None:
    shown = mellum2("info", "mellum2-12b")
    assert shown.code == 0
    for count in (
        "12,149,923,072",
        "12,578,294,528",
        "2,439,060,736",
        "2,520,615,680",
        "17.570 GFLOP",
    ):
        assert count in shown.out


def test_info_is_the_same_of_a_recipe_a_preset_and_a_folder(hf_folder: Path) -> None:
    preset = json.loads(mellum2("info", "mellum2-tiny", "--json").out)
    of_recipe = json.loads(mellum2("info", TINY, "--json").out)
    assert of_recipe.pop("memory_per_rank") is not None
    assert preset.pop("memory_per_rank") is None
    assert of_recipe["parameters"] == preset["parameters"]
    folder = json.loads(mellum2("info", "--hf-path", hf_folder, "--json").out)
    tensors = load_tensors(hf_folder)
    assert folder["tensors"]["total_with_mtp"] == len(tensors)
    assert folder["parameters"]["total_with_mtp"] == sum(
        tensor.numel() for tensor in tensors.values()
    )


def test_dry_run_is_a_run_file(small_run: list[str], tmp_path: Path) -> None:
    """The output of `--dry-run` is a run file of the same run; overrides may stand anywhere."""
    output = tmp_path / "run"
    shown = mellum2("train", *small_run, "--dry-run", "--output", output, "optimizer.lr=1e-3")
    assert (shown.code, shown.err) == (0, "")
    assert not output.exists()
    run = from_yaml(shown.out)
    assert (run.optimizer.lr, run.architecture.num_experts, run.checkpoint.output) == (
        1e-3,
        4,
        str(output),
    )
    file = tmp_path / "run.yaml"
    file.write_text(shown.out)
    assert mellum2("train", file, "--device", "cpu", "--dry-run").out == shown.out
    changed = mellum2(
        "train", "--dry-run", file, "optimizer.lr=2e-3", "--device", "cpu", "layout.ep=1"
    )
    assert (from_yaml(changed.out).optimizer.lr, from_yaml(changed.out).layout.ep) == (2e-3, 1)
    assert "# 1 cpu rank(s)" in changed.out
    assert from_yaml(mellum2("train", TINY, "--dry-run").out).checkpoint.output == f"runs/{TINY}"


def test_a_dry_run_checks_the_data(small_run: list[str], corpus: Path, tmp_path: Path) -> None:
    shown = mellum2("train", *small_run, "--dry-run").out
    assert "# training data: " in shown
    assert " epochs)" in shown
    for word in (f"data.path={tmp_path}", f"data.train=[[1,{corpus}],[1,{tmp_path}]]"):
        mellum2("train", *small_run, "--dry-run", word).refused(str(tmp_path), "prepared corpus")
        assert "data-present" in mellum2("doctor", *small_run, word).out
    mellum2("train", *small_run, "--dry-run", "data.path=nowhere").refused("data.path=nowhere")
    shown = mellum2("train", BIG, "--nproc", "256", "--dry-run").out
    assert "# data: not checked, " in shown


def test_a_dry_run_checks_the_checkpoint_it_would_load(
    small_run: list[str], tmp_path: Path
) -> None:
    for key in ("checkpoint.load", "checkpoint.continue_from"):
        word = f"{key}={tmp_path / 'none'}"
        started = mellum2("train", *small_run, word)
        started.refused(word, "there is no checkpoint")
        assert mellum2("train", *small_run, "--dry-run", word).err == started.err
        doctor = mellum2("doctor", *small_run, word)
        assert (doctor.code, started.err.partition("error: ")[2] in doctor.out) == (2, True)
    # That of a recipe may be made later, or elsewhere.
    shown = mellum2("train", "mellum2_tiny_pretrain_phase2", "--dry-run")
    assert shown.code == 0
    assert "# would be refused now: checkpoint.continue_from=" in shown.out


def test_prepare_prints_the_encoder_and_the_size(prepare_result: tuple[Path, Result]) -> None:
    folder, result = prepare_result
    assert (result.code, result.err) == (0, "")
    tokens = load_prepared(folder).splits["train"].tokens
    encoder, wrote = result.out.splitlines()
    assert encoder.startswith("encoded with tiktoken: the same ids as tokenizers on 2,")
    assert encoder.endswith("fixed texts, all 348 entries and 40 documents")
    assert wrote == f"wrote {folder}: {tokens:,} training tokens"


def test_conversion_and_scoring_agree(hf_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Import, export, round trip, verify and score on a folder that transformers wrote."""
    assert (
        mellum2(
            "convert", "export", "--megatron-path", checkpoint, "--hf-path", tmp_path / "back"
        ).code
        == 0
    )
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
        assert (
            mellum2("score", "--tokens", tmp_path / "tokens.npy", "--out", out, option, folder).code
            == 0
        )
        logits[option] = np.load(out)
    for name in ("logits", "mtp_logits"):
        ours, theirs = (logits[option][name] for option in logits)
        assert ours.shape == (3, 20, 96)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours[:, :-1], theirs[:, :-1], atol=1e-4)


def test_verify_ends_with_1_when_logits_differ(
    hf_folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(hf_folder, tmp_path / "other"))
    tensors = load_tensors(other)
    tensors["lm_head.weight"][7] += 0.25
    save_tensors(other, tensors)
    result = mellum2("verify", "--megatron-path", checkpoint, "--hf-path", other)
    assert result.code == 1
    assert "DIFFER" in result.out


def test_generate_takes_a_megatron_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """The text of its export; a checkpoint without a tokenizer names the command that adds one."""
    write_model(tmp_path / "model")
    import_hf(tmp_path / "model", tmp_path / "megatron")
    megatron, exported = tmp_path / "megatron", tmp_path / "hf"
    assert (
        mellum2("convert", "export", "--megatron-path", megatron, "--hf-path", exported).code == 0
    )
    words = ["generate", "--prompt", "def f(", "--max-new-tokens", "3"]
    direct = mellum2(*words, "--megatron-path", megatron)
    assert (direct.code, direct.out) == (0, mellum2(*words, "--hf-path", exported).out)
    assert direct.out.startswith("def f(")
    assert "to a temporary folder" in direct.err
    sampled = [*words, "--hf-path", exported, "--temperature", "2", "--seed"]
    texts = [mellum2(*sampled, seed).out for seed in ("1", "1", "2", "3")]
    assert texts[0] == texts[1]
    assert len({direct.out, *texts}) > 2
    mellum2(*words, "--hf-path", exported, "--temperature", "nan").refused("temperature=nan")
    mellum2(*words, "--megatron-path", checkpoint).refused("no tokenizer", "--tokenizer DIR")
    mellum2(*words).refused("exactly one model")
