"""Import and export: bytes, layout, and the exported folder as transformers loads it."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, MellumForCausalLM
from transformers.modeling_layers import MtpModel

from conversion.convert import export_hf, import_hf, roundtrip
from conversion.huggingface import writer as hf_writer
from conversion.jobs import safetensors_result
from conversion.jobs.tensor_checks import TensorChecks
from conversion.torch_dist.reader import TorchDistReader
from conversion.torch_dist.writer import Chunk
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.checkpoint.folder import write_architecture, write_tracker
from mellum2_megatron.common.errors import InputError, WorkError
from tests.conversion.folders import (
    VARIANTS,
    load_tensors,
    models,
    save_tensors,
    unfused,
    whole_chunk,
    write_folder,
    write_torch_dist,
)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_round_trip_keeps_every_byte(
    changes: dict[str, Any], fused: bool, files: int, tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "hf", changes, fused=fused, files=files)
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "out")
    before, after = unfused(load_tensors(source)), load_tensors(tmp_path / "out")
    assert after.keys() == before.keys()  # the released layout, from fused experts too
    assert all(
        torch.equal(before[name].view(torch.int16), after[name].view(torch.int16))
        for name in before
    )
    report = roundtrip(source)
    assert report.ok
    assert report.tensors == len(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_non_finite_values_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", dtype=dtype)
    tensors = load_tensors(source)
    tensors["lm_head.weight"][0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40]).to(
        dtype
    )
    save_tensors(source, tensors)
    for target in ("megatron", "out"):
        with pytest.raises(
            InputError, match=r"lm_head\.weight' has 2 of 2304 values NaN or infinite"
        ):
            import_hf(source, tmp_path / target)
    as_it_is = TensorChecks(allow_nonfinite=True)
    import_hf(source, tmp_path / "megatron", checks=as_it_is)
    with pytest.raises(
        InputError, match=r"output_layer\.weight' has 2 of 2304 values NaN or infinite"
    ):
        export_hf(tmp_path / "megatron", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
    export_hf(tmp_path / "megatron", tmp_path / "out", checks=as_it_is)
    after = load_tensors(tmp_path / "out")
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(
        dtype
    ).removeprefix("torch.")


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_transformers_loads_the_export_into_the_same_model(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    main, mtp = models(changes)
    import_hf(write_folder(tmp_path / "hf", changes, dtype=torch.float32), tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "out")
    loaded, info = MellumForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "error_msgs"))
    expected = main.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    if mtp is not None:
        heads = MtpModel.from_pretrained(loaded).state_dict()
        assert heads.keys() == mtp.state_dict().keys()
        assert all(torch.equal(value, mtp.state_dict()[name]) for name, value in heads.items())
    for name in (
        "layer_types",
        "sliding_window",
        "rope_parameters",
        "mtp_layer_types",
        "num_mtp_layers",
    ):
        assert getattr(loaded.config, name) == getattr(main.config, name), name


def test_megatron_layout_of_an_import(hf_folder: Path, checkpoint: Path) -> None:
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text() == "release"
    folder = find_checkpoint(checkpoint)
    assert folder.iteration_dir == checkpoint / "release"
    assert folder.iteration is None
    assert find_checkpoint(checkpoint / "release") == folder
    reader, tensors = TorchDistReader(folder.iteration_dir), load_tensors(hf_folder)
    gate_up = [
        tensors[f"model.layers.2.mlp.experts.1.{part}_proj.weight"] for part in ("gate", "up")
    ]
    fc1 = reader.read(
        "decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 1, 0, 0), (1, 1, 24, 24)
    )
    assert torch.equal(fc1[0, 0], torch.cat(gate_up))
    whole = reader.read("decoder.layers.self_attention.linear_proj.weight", (0, 0, 0), (3, 24, 32))
    for layer in range(3):
        assert torch.equal(whole[layer], tensors[f"model.layers.{layer}.self_attn.o_proj.weight"])


def test_read_cuts_any_box_out_of_any_chunks(tmp_path: Path) -> None:
    whole = torch.arange(5 * 6 * 4).reshape(5, 6, 4).float()
    boxes = [
        ((a, b, 0), (size_a, size_b, 4))
        for a, size_a in ((0, 2), (2, 3))
        for b, size_b in ((0, 1), (1, 5))
    ]

    def part(offset: tuple[int, ...], extent: tuple[int, ...]) -> tuple[Chunk, torch.Tensor]:
        box = tuple(slice(low, low + size) for low, size in zip(offset, extent, strict=True))
        chunk = Chunk(
            key="w",
            global_shape=(5, 6, 4),
            offset=offset,
            extent=extent,
            dtype=torch.float32,
        )
        return chunk, whole[box]

    write_torch_dist(tmp_path, [[part(*box) for box in boxes[:3]], [part(*boxes[3])]])
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("w", (0, 0, 0), (5, 6, 4)), whole)
    assert torch.equal(reader.read("w", (1, 0, 1), (2, 4, 2)), whole[1:3, 0:4, 1:3])
    assert torch.equal(reader.read("w", (4, 5, 3), (1, 1, 1)), whole[4:, 5:, 3:])


def test_large_models_are_cut_into_files_with_an_index(
    hf_folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = hf_writer.plan_shards
    monkeypatch.setattr(
        safetensors_result,
        "plan_shards",
        lambda entries, dtype: plan(entries, dtype, max_bytes=9000),
    )
    export_hf(checkpoint, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in load_tensors(hf_folder).values()
    )
    assert all(file.stat().st_size < 9000 + 4000 for file in files)
    assert all(
        int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0 for file in files
    )  # data stays aligned
    with safe_open(files[0], framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert roundtrip(tmp_path / "out").ok
    MtpModel.from_pretrained(MellumForCausalLM.from_pretrained(tmp_path / "out"))


def test_dtype_is_converted_on_request_only(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", dtype=torch.float32)
    import_hf(source, tmp_path / "half", dtype="bfloat16")
    import_hf(source, tmp_path / "full")
    export_hf(tmp_path / "half", tmp_path / "a")
    export_hf(tmp_path / "full", tmp_path / "b", dtype="bfloat16")
    wanted = {name: tensor.to(torch.bfloat16) for name, tensor in load_tensors(source).items()}
    for folder in ("a", "b"):
        tensors = load_tensors(tmp_path / folder)
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(wanted[name], tensors[name]) for name in wanted)
    with pytest.raises(InputError, match="float8"):
        import_hf(source, tmp_path / "never", dtype="float8")
    assert not (tmp_path / "never").exists()


def test_tokenizer_and_generation_config_travel_along(hf_copy: Path, tmp_path: Path) -> None:
    make_tokenizer(hf_copy, 90)
    (hf_copy / "generation_config.json").write_text('{"eos_token_id": [1, 28], "temperature": 0.3}')
    (hf_copy / "chat_template.jinja").write_text("{{ messages }}")
    import_hf(hf_copy, tmp_path / "megatron")
    assert (
        find_checkpoint(tmp_path / "megatron").tokenizer_dir == tmp_path / "megatron" / "tokenizer"
    )
    export_hf(tmp_path / "megatron", tmp_path / "out")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (hf_copy / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("w7 w8") == [7, 8]


def test_tokenizer_given_at_export(checkpoint: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "fits", 96)
    export_hf(checkpoint, tmp_path / "out", tokenizer=tmp_path / "fits")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("w95") == [95]
    assert (
        GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 1
    )  # derived from the architecture
    make_tokenizer(tmp_path / "large", 97)
    for folder, message in (("large", "token id 96"), ("absent", r"tokenizer\.json")):
        with pytest.raises(InputError, match=message):
            export_hf(checkpoint, tmp_path / "never", tokenizer=tmp_path / folder)
    assert not (tmp_path / "never").exists()


def test_padded_vocabulary_is_cut_off(checkpoint: Path, hf_folder: Path, tmp_path: Path) -> None:
    """A tensor-parallel run pads the vocabulary's rows to a multiple of 128 x TP."""
    source = TorchDistReader(checkpoint / "release")

    def padded(key: str) -> tuple[Chunk, torch.Tensor]:
        tensor = source.read(key, (0,) * len(source.tensors[key].shape), source.tensors[key].shape)
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            tensor = torch.cat([tensor, torch.full((32, tensor.shape[1]), 9.0, dtype=tensor.dtype)])
        return whole_chunk(key, tensor), tensor

    target = tmp_path / "padded" / "iter_0000007"
    target.mkdir(parents=True)
    write_torch_dist(target, [[padded(key) for key in source.tensors]])
    write_tracker(tmp_path / "padded", 7)
    write_architecture(tmp_path / "padded", find_checkpoint(checkpoint).architecture)
    export_hf(tmp_path / "padded", tmp_path / "out")
    before, after = load_tensors(hf_folder), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_manifests_hold_what_was_written(hf_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path / "out")
    records = json.loads((tmp_path / "out" / "weights_manifest.json").read_text())["weights"]
    tensors = load_tensors(hf_folder)
    assert [record["name"] for record in records] == sorted(tensors)
    for record in records:
        tensor = tensors[record["name"]]
        assert (
            record["sha256"]
            == hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        )
        assert (record["shape"], record["dtype"]) == (list(tensor.shape), "bfloat16")
    megatron = json.loads((checkpoint / "release" / "weights_manifest.json").read_text())["weights"]
    router = next(
        record for record in megatron if record["name"] == "decoder.layers.mlp.router.weight[1]"
    )
    gate = tensors["model.layers.1.mlp.gate.weight"]
    assert router["sha256"] == hashlib.sha256(gate.view(torch.uint8).numpy().tobytes()).hexdigest()


# -- targets and interruptions -------------------------------------------------------------------


def test_an_existing_target_needs_overwrite(
    hf_folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = write_folder(tmp_path / "other", seed=1)
    import_hf(other, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        import_hf(hf_folder, tmp_path / "megatron")
    with pytest.raises(InputError, match="not empty"):
        export_hf(checkpoint, tmp_path / "out")
    assert load_tensors(tmp_path / "out").keys() == load_tensors(other).keys()
    import_hf(hf_folder, tmp_path / "megatron", overwrite=True)
    export_hf(tmp_path / "megatron", tmp_path / "out", overwrite=True)
    before, after = load_tensors(hf_folder), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "other", "out"]


def test_overwrite_replaces_conversions_only(
    hf_copy: Path, checkpoint_copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    (checkpoint_copy / "iter_0000010").mkdir()
    (tmp_path / "file").write_text("x")
    for target, message in (
        (tmp_path / "notes", "does not hold one"),
        (checkpoint_copy, "iter_0000010"),
        (hf_copy, "source"),
        (tmp_path, "source"),
        (tmp_path / "file", "a file"),
    ):
        with pytest.raises(InputError, match=message):
            import_hf(hf_copy, target, overwrite=True)
    assert (tmp_path / "notes" / "thesis.txt").exists()
    assert (hf_copy / "model.safetensors").exists()


@pytest.mark.parametrize("limit", [3000, 9000, 150_000])
def test_a_disk_that_fills_up_is_reported_plainly(limit: int, tmp_path: Path) -> None:
    """A limit on file sizes fails the write itself: in the metadata, in an archive, in a tensor."""
    source = write_folder(tmp_path / "hf", {"vocab_size": 4096})
    import_hf(source, tmp_path / "megatron")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for convert_one, origin in ((import_hf, source), (export_hf, tmp_path / "megatron")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(WorkError, match="disk filled up") as caught:
                convert_one(origin, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not (tmp_path / "out").exists()
        kept = (tmp_path / ".out.partial").exists()
        assert kept == ("the same command continues them" in str(caught.value))
        convert_one(origin, tmp_path / "out")  # without the limit
        shutil.rmtree(tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_a_disk_without_room_is_refused_before_writing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(WorkError, match=r"0\.00 MB free"):
        export_hf(checkpoint, tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def make_tokenizer(folder: Path, words: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
