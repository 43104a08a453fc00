"""Invalid files and occupied targets: one message, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mellum2_megatron.architecture import PRESETS
from mellum2_megatron.checkpoint.folder import TRACKER_FILE
from tests.cli.runner import mellum2, snapshot
from tests.conversion.folders import load_tensors, save_tensors


def _missing(folder: Path) -> None:
    tensors = load_tensors(folder)
    del tensors["model.norm.weight"]
    save_tensors(folder, tensors)


def _extra(folder: Path) -> None:
    save_tensors(
        folder, {**load_tensors(folder), "model.extra.weight": torch.zeros(2, dtype=torch.bfloat16)}
    )


def _misshapen(folder: Path) -> None:
    save_tensors(
        folder,
        {**load_tensors(folder), "lm_head.weight": torch.zeros(95, 24, dtype=torch.bfloat16)},
    )


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
def test_folder_of_another_model_is_refused(
    damage: Callable[[Path], None],
    named: list[str],
    hf_folder: Path,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(hf_folder, tmp_path / "hf"))
    damage(folder)
    np.save(tmp_path / "tokens.npy", np.ones((1, 4), dtype=np.int64))
    before = snapshot(tmp_path)
    target = ["--megatron-path", tmp_path / "target"]
    mellum2("convert", "import", "--hf-path", folder, *target).refused(*named)
    mellum2("convert", "roundtrip", "--hf-path", folder).refused(*named)
    mellum2("verify", "--megatron-path", checkpoint, "--hf-path", folder).refused(*named)
    tokens, out = ["--tokens", tmp_path / "tokens.npy"], ["--out", tmp_path / "out.npz"]
    mellum2("score", *tokens, *out, "--hf-path", folder).refused(*named)
    assert snapshot(tmp_path) == before


def test_a_folder_of_the_other_form_leads_to_the_right_command(
    hf_folder: Path, checkpoint: Path, small_run: list[str], tmp_path: Path
) -> None:
    np.save(tmp_path / "tokens.npy", np.ones((1, 4), dtype=np.int64))
    score = ["score", "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "out.npz"]
    before = snapshot(tmp_path)
    mellum2(*score, "--hf-path", checkpoint).refused(f"give --megatron-path {checkpoint}")
    mellum2(*score, "--megatron-path", hf_folder).refused(f"give --hf-path {hf_folder}")
    mellum2("verify", "--megatron-path", hf_folder, "--hf-path", checkpoint).refused(
        f"give --hf-path {hf_folder} and --megatron-path {checkpoint}"
    )
    export = f"mellum2 convert export --megatron-path {checkpoint} --hf-path {checkpoint}-hf"
    mellum2("verify", "--megatron-path", checkpoint, "--hf-path", checkpoint).refused(export)
    for words in ([checkpoint, hf_folder], [hf_folder, checkpoint]):
        mellum2("convert", "stitch-mtp", *words, "--output", tmp_path / "x").refused(export)
    mellum2("convert", "export", "--megatron-path", hf_folder, "--hf-path", tmp_path / "x").refused(
        f"mellum2 convert import --hf-path {hf_folder} --megatron-path {hf_folder}-megatron"
    )
    target = ["--megatron-path", tmp_path / "x"]
    mellum2("convert", "import", "--hf-path", checkpoint, *target).refused(export)
    mellum2("train", hf_folder).refused(f"RECIPE architecture={hf_folder}")
    output = ["--output", tmp_path / "run"]
    mellum2("train", *small_run, f"checkpoint.continue_from={hf_folder}", *output).refused(
        f"use checkpoint.load={hf_folder}"
    )
    assert snapshot(tmp_path) == before


def test_checkpoints_of_another_architecture_are_refused(
    checkpoint: Path, run_folder: Path, small_run: list[str], tmp_path: Path
) -> None:
    foreign = Path(shutil.copytree(checkpoint, tmp_path / "foreign"))
    (foreign / "architecture.json").write_text(json.dumps(PRESETS["mellum2-tiny"].to_dict()))
    before = snapshot(tmp_path)
    mellum2("convert", "export", "--megatron-path", foreign, "--hf-path", tmp_path / "hf").refused(
        "architecture.json"
    )
    mellum2("train", *small_run, "architecture.num_experts=8", "--output", run_folder).refused(
        "num_experts: 4 there, 8 here", "--output"
    )
    load = ["--output", tmp_path / "new", f"checkpoint.load={run_folder}"]
    mellum2("train", *small_run, "architecture.num_experts=8", *load).refused(
        "num_experts: 4 there, 8 here"
    )
    mellum2("train", *small_run, "optimizer.name=adam", "--output", run_folder).refused(
        "optimizer.name=adam", "muon"
    )
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("tracker", ["", "99", "soon"])
def test_tracker_without_its_checkpoint_is_refused(
    tracker: str, run_folder: Path, small_run: list[str]
) -> None:
    """Megatron itself would train anew, without an error."""
    (run_folder / TRACKER_FILE).write_text(tracker)
    before = snapshot(run_folder)
    mellum2("train", *small_run, "--output", run_folder).refused(TRACKER_FILE)
    assert snapshot(run_folder) == before


def _tokens_files(folder: Path) -> dict[str, str]:
    """Write invalid files of tokens; return what the message on each must contain."""
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


def test_invalid_files_of_tokens_are_refused(
    hf_folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    files = _tokens_files(tmp_path)
    before = snapshot(tmp_path)
    for name, named in files.items():
        for model in (["--hf-path", hf_folder], ["--megatron-path", checkpoint]):
            words = ["score", "--tokens", tmp_path / name, "--out", tmp_path / "out.npz", *model]
            mellum2(*words).refused(named)
    assert snapshot(tmp_path) == before


def test_score_takes_one_checkpoint_and_writes_one_file(
    hf_folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.ones((1, 4), dtype=np.int64))
    before = snapshot(tmp_path)
    words = ["score", "--tokens", tokens, "--out"]
    one = "give either --megatron-path or --hf-path"
    mellum2(*words, tmp_path / "out.npz").refused(one)
    mellum2(
        *words, tmp_path / "out.npz", "--hf-path", hf_folder, "--megatron-path", checkpoint
    ).refused(one)
    mellum2(*words, tmp_path, "--hf-path", hf_folder).refused("--out", "is a folder")
    mellum2(*words, tokens / "out.npz", "--hf-path", hf_folder).refused("is a file, not a folder")
    mellum2(*words, tokens, "--hf-path", hf_folder).refused("is the file of tokens")
    assert snapshot(tmp_path) == before


def test_occupied_targets_are_refused(
    hf_folder: Path,
    checkpoint: Path,
    texts: Path,
    small_run: list[str],
    run_folder: Path,
    tmp_path: Path,
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
    mellum2("train", *small_run, "--output", tmp_path / "file" / "inside").refused(
        "is a file, not a folder"
    )
    mellum2(
        "train", *small_run, "--output", tmp_path / "new", f"data.cache={tmp_path}/file"
    ).refused("data.cache")
    assert snapshot(tmp_path) == before


CHAT = ["--mode", "instruct"]
PLAN = """
name: x
tokenizer: {tokenizer}
output: {output}
sources: {{code: {{kind: code, inputs: [{texts}]}}}}
phases: [{{tokens: 100, mixture: {{code: 100}}, sequence_length: 64}}]
"""


def test_read_only_disk_is_refused(
    mounted: Callable[[str], Path],
    hf_folder: Path,
    small_run: list[str],
    texts: Path,
    corpus: Path,
    tmp_path: Path,
) -> None:
    """A read-only file system, which stops even root."""
    disk = mounted("ro")
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.format(tokenizer=corpus / "tokenizer", texts=texts, output=disk / "plan"))
    np.save(tmp_path / "tokens.npy", np.ones((1, 4), dtype=np.int64))
    tokens, out = ["--tokens", tmp_path / "tokens.npy"], ["--out", disk / "out.npz"]
    for words in (
        ["train", *small_run, "--output", disk / "run"],
        ["convert", "import", "--hf-path", hf_folder, "--megatron-path", disk / "checkpoint"],
        ["data", "prepare", "--input", texts, "--output", disk / "corpus"],
        ["data", "prepare", "--input", texts, "--output", disk / "x", "--format", "megatron"],
        ["data", "chat", texts, "--output", disk / "chat", "--tokenizer", hf_folder, *CHAT],
        *(["data", word, plan] for word in ("plan", "run", "report")),
        ["score", *tokens, *out, "--hf-path", hf_folder],
    ):
        mellum2(*words).refused(str(disk), "not writable")
