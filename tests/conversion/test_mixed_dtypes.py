"""Routers or norms in float32 beside bfloat16: refused, settled by the user, or kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from conversion.convert import export_hf, import_hf, plan_import, roundtrip, stitch_mtp
from conversion.torch_dist.reader import TorchDistReader
from conversion.verification.verify import verify
from mellum2_megatron.common.errors import InputError
from tests.conversion.folders import load_tensors, save_tensors


def mixed(
    source: Path, folder: Path, part: str, dtype: torch.dtype = torch.float32, *, files: int = 1
) -> Path:
    """Copy a folder, tensors with `part` in their names in `dtype`, with new values."""
    shutil.copytree(source, folder)
    tensors = load_tensors(source)
    for name, tensor in tensors.items():
        if part in name:
            tensors[name] = (tensor.float() * (1 + 2.0**-12)).to(dtype)
    save_tensors(folder, tensors, files)
    return folder


@pytest.mark.parametrize("part", ["mlp.gate.weight", "norm"])
def test_a_mixture_is_kept_to_the_byte(part: str, hf_folder: Path, tmp_path: Path) -> None:
    source = mixed(hf_folder, tmp_path / "hf", part, files=2)
    import_hf(source, tmp_path / "megatron", keep_dtypes=True)
    stored = TorchDistReader(tmp_path / "megatron" / "release").tensors
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32, torch.bfloat16}
    with pytest.raises(InputError, match=r"--torch-dtype float32 \(exact\), --keep-dtypes"):
        export_hf(tmp_path / "megatron", tmp_path / "out")
    export_hf(tmp_path / "megatron", tmp_path / "out", keep_dtypes=True)
    before, after = load_tensors(source), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    report = roundtrip(source)
    assert report.ok
    assert "bfloat16 and float32" in str(report)


def test_megatron_and_transformers_read_a_mixture(
    hf_folder: Path, tmp_path: Path, megatron_world: None
) -> None:
    source = mixed(hf_folder, tmp_path / "hf", "mlp.gate.weight")
    import_hf(source, tmp_path / "megatron", keep_dtypes=True)
    assert verify(tmp_path / "megatron", source).ok


def test_an_unsettled_mixture_is_refused_with_the_exact_way_first(
    hf_folder: Path, tmp_path: Path
) -> None:
    source = mixed(hf_folder, tmp_path / "hf", "mlp.gate.weight")
    with pytest.raises(InputError) as refused:
        import_hf(source, tmp_path / "megatron")
    message = str(refused.value)
    assert "model.layers.0.mlp.gate.weight (float32)" in message
    assert "Fix: pass --torch-dtype float32 (exact)" in message
    assert message.index("--keep-dtypes") < message.index("--torch-dtype bfloat16 (rounds")
    with pytest.raises(InputError, match="give one of them"):
        import_hf(source, tmp_path / "megatron", dtype="float32", keep_dtypes=True)
    assert not (tmp_path / "megatron").exists()


def test_one_dtype_settles_a_mixture(
    hf_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """float32 loses nothing; bfloat16 rounds, and a warning names how many tensors."""
    source = mixed(hf_folder, tmp_path / "hf", "mlp.gate.weight")
    tensors = load_tensors(source)
    import_hf(source, tmp_path / "exact", dtype="float32")
    assert not caplog.messages
    export_hf(tmp_path / "exact", tmp_path / "float32")
    for name, tensor in load_tensors(tmp_path / "float32").items():
        assert torch.equal(tensor, tensors[name].float()), name
    assert plan_import(source, tmp_path / "rounded", dtype="bfloat16").dtype == "bfloat16"
    caplog.clear()
    import_hf(source, tmp_path / "rounded", dtype="bfloat16")
    (line,) = caplog.messages
    assert "4 tensors are rounded to bfloat16, first model.layers.0.mlp.gate.weight" in line
    import_hf(source, tmp_path / "kept", keep_dtypes=True)
    caplog.clear()
    export_hf(tmp_path / "kept", tmp_path / "hf16", dtype="bfloat16")
    assert "4 tensors are rounded to bfloat16" in caplog.messages[0]


def test_megatron_has_one_dtype_a_tensor(hf_folder: Path, tmp_path: Path) -> None:
    """Query and key are parts of one tensor, and so are a weight's layers."""
    for number, part in enumerate(("layers.1.self_attn.q_proj", "model.layers.1.mlp.gate")):
        source = mixed(hf_folder, tmp_path / str(number), part)
        with pytest.raises(InputError, match=r"both are parts of .* --torch-dtype float32"):
            import_hf(source, tmp_path / "megatron", keep_dtypes=True)
        import_hf(source, tmp_path / f"exact{number}", dtype="float32")


@pytest.mark.parametrize(
    ("dtype", "fix"),
    [
        (torch.float64, "save it as float32"),
        (torch.float8_e4m3fn, "convert an unquantised checkpoint"),
        (torch.int8, "convert an unquantised checkpoint"),
        (torch.int64, "convert an unquantised checkpoint"),
    ],
    ids=str,
)
def test_other_dtypes_are_refused_whatever_is_asked(
    dtype: torch.dtype, fix: str, hf_folder: Path, tmp_path: Path
) -> None:
    source = mixed(hf_folder, tmp_path / "hf", "mlp.gate.weight", dtype)
    for options in ({}, {"dtype": "float32"}, {"keep_dtypes": True}):
        with pytest.raises(InputError, match=fix):
            import_hf(source, tmp_path / "megatron", **options)


def test_a_head_is_put_back_beside_a_mixture(hf_folder: Path, tmp_path: Path) -> None:
    source = mixed(hf_folder, tmp_path / "hf", "mlp.gate.weight")
    lost = Path(shutil.copytree(source, tmp_path / "lost"))
    tensors = load_tensors(source)
    save_tensors(lost, {name: t for name, t in tensors.items() if not name.startswith("mtp.")})
    stitch_mtp(source, lost, tmp_path / "out")
    stitched = load_tensors(tmp_path / "out")
    assert stitched.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stitched[name].dtype == tensor.dtype, name
        assert torch.equal(stitched[name], tensor), name
