"""`mellum2 eval`: a folder and a checkpoint, its table and its file, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conversion.convert import import_hf
from tests.cli.runner import mellum2, snapshot
from tests.conversion.releases import write_model

LONG = [
    "position_loss.texts=2",
    "position_loss.length=100",
    "needle.items=2",
    "needle.lengths=100,128",
    "needle.digits=2",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("eval") / "model")


def test_a_folder_and_its_checkpoint_have_the_same_figures(
    model: Path, texts: Path, tmp_path: Path
) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out.json"
    import_hf(model, checkpoint)
    settings = [*LONG, f"needle.text={texts}", f"position_loss.text={texts}"]
    before = snapshot(model)
    result = mellum2("eval", model, "--suite", "long", *settings, "--out", out)
    assert result.code == 0, result
    assert snapshot(model) == before
    for text in ("loss, nats a token", "preferred, share", f"wrote {out}"):
        assert text in result.out
    again = mellum2("eval", checkpoint, "--suite", "long", *settings)
    assert again.code == 0, again
    first = json.loads(out.read_text())
    second = json.loads((checkpoint / "eval_long.json").read_text())
    assert first["measures"] == second["measures"]
    assert second["model"] == str(checkpoint)


def test_bad_input_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    before = snapshot(model)
    mellum2("eval", model, "--suite", "long", "needle.lengths=129").refused(
        "needle.lengths=129", "max_position_embeddings=128"
    )
    mellum2("eval", model, "--suite", "lng").refused("--suite lng", "did you mean 'long'")
    mellum2("eval", tmp_path / "none", "--suite", "long").refused("there is no such folder")
    mellum2("eval", model, "--suite", "long", "--out", tmp_path).refused(f"--out {tmp_path}")
    assert snapshot(model) == before


def test_a_checkpoint_without_tokenizer_is_refused(checkpoint: Path) -> None:
    mellum2("eval", checkpoint, "--suite", "needle").refused("the checkpoint has no tokenizer")
