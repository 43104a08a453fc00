"""Options of `mellum2 convert` under the names of Megatron-Bridge."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mellum2_megatron.cli.app import app


@pytest.mark.parametrize("option", ["--hf-path", "--hf-model"])
def test_the_hugging_face_folder_has_two_names(
    option: str, hf_folder: Path, checkpoint: Path, tmp_path: Path
):
    for command, given in (("import", hf_folder), ("export", tmp_path / "exported")):
        megatron = tmp_path / "megatron" if command == "import" else checkpoint
        arguments = [
            "convert",
            command,
            option,
            str(given),
            "--megatron-path",
            str(megatron),
            "--dry-run",
        ]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert str(megatron) in result.output.replace("\n", "")
    assert not any(tmp_path.iterdir())
