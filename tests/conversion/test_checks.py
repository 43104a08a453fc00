"""Manifests, finite values, plans, layouts and progress."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from conversion.convert import export_hf, import_hf, plan_export, plan_import
from conversion.jobs.tensor_checks import TensorChecks
from mellum2_megatron.cli.app import app
from mellum2_megatron.common.byte_progress import LineProgress
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Layout
from tests.conversion.folders import load_tensors, save_tensors, write_folder

# -- manifests -----------------------------------------------------------------------------------


@pytest.fixture
def exported(checkpoint: Path, tmp_path: Path) -> Path:
    export_hf(checkpoint, tmp_path / "exported")
    return tmp_path / "exported"


def flip(path: Path, position: int) -> None:
    """Change the lowest mantissa bit of one value, which stays finite; no size changes."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_one_changed_bit_in_a_safetensors_file_is_found(exported: Path, tmp_path: Path) -> None:
    import_hf(exported, tmp_path / "fine")
    path = exported / "model.safetensors"
    header = json.loads(
        (content := path.read_bytes())[8 : 8 + (size := int.from_bytes(content[:8], "little"))]
    )
    flip(path, 8 + size + header["model.layers.1.mlp.experts.2.up_proj.weight"]["data_offsets"][0])
    with pytest.raises(
        InputError, match=r"'model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight' has SHA-256"
    ):
        import_hf(exported, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "fine"]
    import_hf(exported, tmp_path / "out", checks=TensorChecks(hashes=False))


def test_one_changed_bit_in_a_megatron_checkpoint_is_found(
    checkpoint_copy: Path, tmp_path: Path
) -> None:
    path = checkpoint_copy / "release" / "__2_0.distcp"
    rows = load_checkpoint_row(checkpoint_copy)
    flip(path, path.read_bytes().index(rows))
    with pytest.raises(
        InputError, match=r"'decoder\.layers\.mlp\.router\.weight\[1\]' has SHA-256"
    ):
        export_hf(checkpoint_copy, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    export_hf(checkpoint_copy, tmp_path / "out", checks=TensorChecks(hashes=False))


def load_checkpoint_row(checkpoint: Path) -> bytes:
    from conversion.torch_dist.reader import TorchDistReader

    router = TorchDistReader(checkpoint / "release").read(
        "decoder.layers.mlp.router.weight", (1, 0, 0), (1, 3, 24)
    )
    return router.view(torch.uint8).numpy().tobytes()


def test_manifest_of_other_weights_is_refused(exported: Path, tmp_path: Path) -> None:
    path = exported / "weights_manifest.json"
    records = json.loads(path.read_text())["weights"]
    first = records[0]

    def refused(changed: object, message: str) -> None:
        path.write_text(json.dumps({"weights": changed}))
        with pytest.raises(InputError, match=message):
            plan_import(exported, tmp_path / "out")  # before anything is read

    refused(records[1:], re.escape(f"does not list {first['name']}"))
    refused([*records, first | {"name": "extra"}], "lists extra")
    refused([first | {"shape": [1, 2]}, *records[1:]], r"lists bfloat16 \[1, 2\]")
    refused([first | {"dtype": "float32"}, *records[1:]], "lists float32")
    refused([{"name": "x"}], "must list name, shape")
    refused("text", "must list name, shape")
    path.unlink()
    assert not plan_import(exported, tmp_path / "out").hashes


# -- finite values -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1001, -1])
def test_aminmax_sees_every_value_that_is_not_finite(
    dtype: torch.dtype, value: float, place: int
) -> None:
    """The check relies on it: NaN propagates from any position, in a full vector or in the rest."""
    for size in (1, 7, 4099):
        tensor = torch.randn(size).to(dtype)
        assert torch.isfinite(torch.stack(torch.aminmax(tensor))).all()
        tensor[place % size] = value
        assert not torch.isfinite(torch.stack(torch.aminmax(tensor))).all()


def test_overflow_in_a_narrower_dtype_is_an_error(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf")
    tensors = load_tensors(source)
    tensors["model.norm.weight"][3] = 1e5
    save_tensors(source, tensors)
    with pytest.raises(
        InputError,
        match=r"model\.norm\.weight' has 1 of 24 .* overflow float16.*bfloat16 or float32",
    ):
        import_hf(source, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    import_hf(source, tmp_path / "out", dtype="float32")


# -- plans ---------------------------------------------------------------------------------------


def test_plans_state_the_outcome_and_touch_nothing(
    hf_folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    plan = plan_import(hf_folder, tmp_path / "deep" / "megatron", dtype="float32", workers=2)
    exporting = plan_export(checkpoint, tmp_path / "hf")
    assert not list(tmp_path.iterdir())
    tensors = load_tensors(hf_folder)
    assert (plan.tensors, plan.nbytes, plan.dtype) == (
        len(tensors),
        sum(t.nbytes for t in tensors.values()) * 2,
        "float32",
    )
    assert exporting.nbytes * 2 == plan.nbytes
    assert exporting.files == (("model.safetensors", exporting.nbytes),)
    assert exporting.hashes
    assert sum(size for _, size in plan.files) == plan.nbytes
    assert "nothing was written" in str(plan)
    import_hf(hf_folder, tmp_path / "deep" / "megatron", dtype="float32")
    written = {
        f"release/{path.name}"
        for path in (tmp_path / "deep" / "megatron" / "release").glob("*.distcp")
    }
    assert written == {name for name, _ in plan.files}
    with pytest.raises(InputError, match="not empty"):
        plan_import(hf_folder, tmp_path / "deep" / "megatron")
    assert plan_import(hf_folder, tmp_path / "deep" / "megatron", overwrite=True).replaces


def test_peak_memory_is_the_largest_tensor_of_each_worker(hf_folder: Path, tmp_path: Path) -> None:
    """The largest is linear_qkv [64, 24] beside its parts, in every layer; never the model."""
    peaks = [
        plan_import(hf_folder, tmp_path / "out", workers=workers).peak_memory
        for workers in (1, 2, 3)
    ]
    assert peaks == [count * 2 * 64 * 24 * 2 for count in (1, 2, 3)]


# -- layouts -------------------------------------------------------------------------------------


def test_a_layout_the_model_cannot_have(hf_folder: Path, tmp_path: Path) -> None:
    import_hf(hf_folder, tmp_path / "out", layout=Layout(tp=2, sp=True, ep=3, pp=3))
    for layout, message in (
        (Layout(ep=2), r"ep=2: must divide num_experts \(3\)"),
        (Layout(pp=2), r"pp=2: must divide num_hidden_layers \(3\)"),
        (Layout(tp=4, sp=True), r"num_key_value_heads \(2\)"),
        (Layout(etp=5), r"moe_intermediate_size \(12\)"),
    ):
        with pytest.raises(InputError, match=message):
            import_hf(hf_folder, tmp_path / "never", layout=layout)
    assert not (tmp_path / "never").exists()


# -- progress ------------------------------------------------------------------------------------


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    progress = LineProgress("import", 24_000_000_000, done=4_000_000_000, clock=lambda: now)
    for now in (10.0, 29.0, 40.0, 45.0):  # noqa: B007
        progress(1_000_000_000)
    assert capsys.readouterr().err == "import: 7.00 GB of 24.00 GB, 75 MB/s, 227 s left\n"


def test_disk_errors_name_the_continuation(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("conversion.jobs.importing.write_manifest", broken)
    with pytest.raises(
        WorkError, match=r"Input/output error.*\.out\.partial: the same command continues them"
    ):
        import_hf(hf_folder, tmp_path / "out")
    monkeypatch.undo()
    import_hf(hf_folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- command line --------------------------------------------------------------------------------


def test_options_reach_the_conversion(hf_copy: Path, tmp_path: Path) -> None:
    def mellum2(*words: object) -> Result:
        return CliRunner().invoke(app, ["convert", *map(str, words)])

    importing = ("import", "--hf-path", hf_copy, "--megatron-path", tmp_path / "out")
    refused = mellum2(*importing, "--ep", 2)
    assert str(refused.exception) == "--ep 2: must divide num_experts (3). Fix: use --ep 1 or 3."
    assert "--workers 0" in str(mellum2(*importing, "--workers", 0).exception)
    assert mellum2(*importing, "--not-strict").exit_code == 2
    planned = mellum2(
        *importing, "--dry-run", "--torch-dtype", "float32", "--workers", 1, "--tp", 2
    )
    assert planned.exit_code == 0
    assert not (tmp_path / "out").exists()
    tensors = load_tensors(hf_copy)
    tensors["model.norm.weight"][0] = float("nan")
    save_tensors(hf_copy, tensors)
    assert isinstance(mellum2(*importing).exception, InputError)
    assert mellum2(*importing, "--allow-nonfinite").exit_code == 0
    exporting = ("export", "--megatron-path", tmp_path / "out", "--hf-path", tmp_path / "hf")
    assert isinstance(mellum2(*exporting).exception, InputError)
    assert mellum2(*exporting, "--allow-nonfinite", "--dry-run").exit_code == 0
    assert mellum2(*exporting, "--allow-nonfinite", "--skip-hashes", "--workers", 1).exit_code == 0
    stitching = ("stitch-mtp", tmp_path / "hf", tmp_path / "hf")
    assert "only a lost one is put back" in str(
        mellum2(*stitching, "--output", tmp_path / "stitched").exception
    )
