"""Folders that cannot be converted: one message, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from conversion.convert import export_hf, import_hf, roundtrip
from conversion.torch_dist.reader import TorchDistReader
from conversion.torch_dist.writer import Chunk
from conversion.verification.scoring import read_tokens
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.checkpoint.folder import iteration_folders, iteration_number, write_tracker
from mellum2_megatron.checkpoint.safe_metadata import read_metadata
from mellum2_megatron.common.errors import InputError
from tests.conversion.folders import load_tensors, save_tensors, write_folder, write_torch_dist

Tensors = dict[str, torch.Tensor]


def refused(folder: Path, target: Path, message: str) -> str:
    """Require that an import fails with a message that matches, and leaves nothing; return it."""
    with pytest.raises(InputError, match=message) as caught:
        import_hf(folder, target / "never")
    assert not (target / "never").exists()
    assert not [path for path in target.iterdir() if path.name.startswith(".never")]
    assert caught.value.rule
    assert caught.value.fix
    return str(caught.value)


def _drop(tensors: Tensors) -> None:
    for expert in range(3):
        del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
    del tensors["model.norm.weight"]


def _add(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32, dtype=torch.bfloat16)


def _misshape(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.gate.weight"] = torch.zeros(4, 24, dtype=torch.bfloat16)


def _transpose(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.o_proj.weight"] = tensors[
        "model.layers.0.self_attn.o_proj.weight"
    ].T.contiguous()


def _quantize(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


def _drop_mtp(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("mtp.")]:
        del tensors[name]


def _fuse_beside(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(3, 24, 12, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"experts\.0\.up_proj\.weight, .* and 1 more missing"),
        (_add, r"self_attn\.q_proj\.bias not part of the model"),
        (_misshape, r"mlp\.gate\.weight \[4, 24\] \(expected \[3, 24\]\)"),
        (_transpose, r"o_proj\.weight \[32, 24\] \(expected \[24, 32\]\)"),
        (_quantize, r"lm_head\.weight of dtype F8_E4M3"),
        (_drop_mtp, r"mtp\.fc\.weight.* missing.*num_nextn_predict_layers to 0"),
        (_fuse_beside, r"beside 'model\.layers\.0\.mlp\.experts\.down_proj'"),
    ],
)
def test_tensors_that_do_not_fit(
    damage: Callable[[Tensors], None], message: str, hf_copy: Path, tmp_path: Path
) -> None:
    tensors = load_tensors(hf_copy)
    damage(tensors)
    save_tensors(hf_copy, tensors)
    refused(hf_copy, tmp_path, message)
    with pytest.raises(InputError, match=message):
        roundtrip(hf_copy)


def test_config_without_the_mtp_head_its_tensors_have(hf_copy: Path, tmp_path: Path) -> None:
    edit_json(hf_copy / "config.json", num_nextn_predict_layers=0, num_mtp_layers=0)
    refused(
        hf_copy, tmp_path, r"mtp\.fc\.weight.* not part of the model.*num_nextn_predict_layers to 1"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
            "model_type='qwen3_moe'",
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"hidden_size": 32}, r"expected \[\d+, 32\]"),
        ({"num_experts": 4, "num_local_experts": 4}, r"experts\.3\..* missing"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers='three'"),
    ],
)
def test_config_of_another_model_is_refused(
    changes: dict[str, Any], message: str, hf_copy: Path, tmp_path: Path
) -> None:
    edit_json(hf_copy / "config.json", **changes)
    refused(hf_copy, tmp_path, message)


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"model_type": "mellum", "model_type": "qwen2"}', "\xff\xfe"]
)
def test_config_that_is_not_a_json_object(content: str, hf_copy: Path, tmp_path: Path) -> None:
    (hf_copy / "config.json").write_bytes(content.encode("latin-1"))
    refused(hf_copy, tmp_path, r"config\.json")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", None])
def test_incomplete_folder_is_refused(missing: str | None, hf_copy: Path, tmp_path: Path) -> None:
    if missing is None:
        refused(tmp_path / "nowhere", tmp_path, "there is no such folder")
        return
    (hf_copy / missing).unlink()
    refused(
        hf_copy,
        tmp_path,
        r"config\.json is missing" if missing == "config.json" else r"no \*\.safetensors",
    )


@pytest.mark.parametrize("keep", [0, 5, 200, -1, -4000])
def test_truncated_safetensors_are_refused(keep: int, hf_copy: Path, tmp_path: Path) -> None:
    path = hf_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(hf_copy, tmp_path, r"model\.safetensors.* complete safetensors file")


def test_a_name_twice_in_a_safetensors_header(hf_copy: Path, tmp_path: Path) -> None:
    """The safetensors library keeps the last of the two in silence."""
    path = hf_copy / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    entry = json.dumps(json.loads(header)["model.norm.weight"])
    header = header[:-1] + f', "model.norm.weight": {entry}}}'.encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    refused(hf_copy, tmp_path, r"'model\.norm\.weight' is given twice")


def test_pickled_weights_are_never_opened(hf_copy: Path, tmp_path: Path) -> None:
    (hf_copy / "model.safetensors").unlink()
    (hf_copy / "pytorch_model.bin").symlink_to("nowhere")  # opening it would fail
    refused(hf_copy, tmp_path, r"pytorch_model\.bin.*never opened")


def test_index_that_disagrees_with_its_files_is_refused(tmp_path: Path) -> None:
    def damaged(name: str) -> tuple[Path, Path]:
        folder = write_folder(tmp_path / name, files=3)
        return folder, folder / "model.safetensors.index.json"

    folder, index = damaged("absent file")
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, tmp_path, r"model-00002-of-00003\.safetensors missing")

    folder, index = damaged("unlisted file")
    save_file({"extra": torch.zeros(1)}, folder / "adapter.safetensors")
    refused(folder, tmp_path, r"adapter\.safetensors not named")

    folder, index = damaged("no index")
    index.unlink()
    refused(folder, tmp_path, r"without model\.safetensors\.index\.json")

    folder, index = damaged("wrong file")
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"lm_head.weight": "model-00001-of-00003.safetensors"})
    refused(folder, tmp_path, r"index\.json: .*must be in the file the index names")

    folder, index = damaged("unlisted tensor")
    edit_json(
        index,
        weight_map={name: file for name, file in weight_map.items() if name != "lm_head.weight"},
    )
    refused(folder, tmp_path, r"lm_head\.weight not listed")

    folder, index = damaged("outside")
    edit_json(index, weight_map=weight_map | {"lm_head.weight": "../other/model.safetensors"})
    refused(folder, tmp_path, r"\.\./other/model\.safetensors missing")

    folder, index = damaged("no map")
    index.write_text('{"weight_map": [1, 2]}')
    refused(folder, tmp_path, "weight_map must map")

    folder, index = damaged("twice")
    other = folder / "model-00001-of-00003.safetensors"
    shutil.copy(other, folder / "model-00002-of-00003.safetensors")
    refused(folder, tmp_path, r"in model-00001-of-00003\.safetensors and model-00002")


def test_links_may_not_leave_the_folder(hf_copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.safetensors"
    (hf_copy / "model.safetensors").rename(outside)
    (hf_copy / "model.safetensors").symlink_to(outside)
    refused(hf_copy, tmp_path, "may not leave")


def test_the_layout_of_the_hub_cache_is_read(hf_folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(hf_folder / name, blobs / str(number))
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert roundtrip(snapshot).ok


# -- Megatron checkpoints ------------------------------------------------------------------------


def not_exported(folder: Path, target: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_hf(folder, target / "never")
    assert not (target / "never").exists()


def test_checkpoint_of_another_architecture_is_refused(
    checkpoint_copy: Path, tmp_path: Path
) -> None:
    path = checkpoint_copy / "architecture.json"
    original = path.read_text()
    for changes, message in (
        (
            {"num_experts": 4},
            r"mlp\.experts\.experts\.linear_fc1\.weight .*\(expected \[3, 4, 24, 24\]\)",
        ),
        ({"num_mtp_layers": 0, "mtp_layer_types": []}, r"mtp\.layers\.0\..* not part of the model"),
        (
            {"vocab_size": 97},
            r"embedding\.word_embeddings\.weight \[96, 24\] \(expected \[97, 24\]\)",
        ),
        ({"hidden_sise": 3}, "hidden_sise"),
    ):
        path.write_text(json.dumps(json.loads(original) | changes))
        not_exported(checkpoint_copy, tmp_path, message)
    path.unlink()
    not_exported(checkpoint_copy, tmp_path, r"architecture\.json is missing")


def test_incomplete_checkpoint_is_refused(checkpoint_copy: Path, tmp_path: Path) -> None:
    release = checkpoint_copy / "release"
    part = release / "__1_0.distcp"
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    not_exported(checkpoint_copy, tmp_path, r"__1_0\.distcp has \d+ bytes")
    part.unlink()
    not_exported(checkpoint_copy, tmp_path, r"__1_0\.distcp is missing")
    part.write_bytes(bytes(len(content)))
    not_exported(checkpoint_copy, tmp_path, "chunks must be readable")
    part.write_bytes(content)
    (release / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    not_exported(checkpoint_copy, tmp_path, "only torch_dist is read")
    (release / "metadata.json").unlink()
    not_exported(checkpoint_copy, tmp_path, r"metadata\.json")


def test_tracker_and_path(checkpoint_copy: Path, tmp_path: Path) -> None:
    not_exported(tmp_path / "nowhere", tmp_path, "there is no such folder")
    write_tracker(checkpoint_copy, 12)
    not_exported(checkpoint_copy, tmp_path, r"iter_0000012 is missing.*release")
    (checkpoint_copy / "latest_checkpointed_iteration.txt").write_text("soon")
    not_exported(checkpoint_copy, tmp_path, "'soon'")
    (checkpoint_copy / "latest_checkpointed_iteration.txt").unlink()
    not_exported(checkpoint_copy, tmp_path, "name one of release")
    export_hf(checkpoint_copy / "release", tmp_path / "out")  # named itself, it needs no tracker


def test_iterations_are_found_in_order(tmp_path: Path) -> None:
    for name in (
        "iter_0000100",
        "iter_0000020",
        "iter_1000000000",
        "release",
        "iter_x",
        "tokenizer",
    ):
        (tmp_path / name).mkdir()
    names = [folder.name for folder in iteration_folders(tmp_path)]
    assert names == ["release", "iter_0000020", "iter_0000100", "iter_1000000000"]
    assert iteration_number("iter_0000100") == 100
    assert iteration_number("iter_-5") is None


def test_a_folder_called_release_may_be_a_root(checkpoint: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(checkpoint, tmp_path / "release"))
    assert find_checkpoint(root).iteration_dir == root / "release"


def test_nothing_in_metadata_is_executed(checkpoint_copy: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "owned"),))

    metadata = read_metadata(checkpoint_copy / "release")
    metadata.planner_data = Payload()
    (checkpoint_copy / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    not_exported(checkpoint_copy, tmp_path, r"posix\.mkdir")
    assert not (tmp_path / "owned").exists()
    (checkpoint_copy / "release" / ".metadata").write_bytes(b"not a pickle")
    not_exported(checkpoint_copy, tmp_path, r"\.metadata uses pickle operation 110")


def test_nothing_in_a_tensor_is_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "owned"),))

    folder = one_tensor_checkpoint(tmp_path / "checkpoint", "w")
    metadata = read_metadata(folder)
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == "w"]
    torch.save(Payload(), folder / "payload")
    info.relative_path, info.offset, info.length = "payload", 0, (folder / "payload").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="must be readable tensors"):
        TorchDistReader(folder).read("w", (0,), (3,))
    assert not (tmp_path / "owned").exists()
    info.relative_path = "../payload"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"\.\./payload.*own folder"):
        TorchDistReader(folder)


def test_chunks_must_cover_their_tensor(tmp_path: Path) -> None:
    folder = one_tensor_checkpoint(tmp_path / "checkpoint", "w", global_shape=(4,))
    with pytest.raises(InputError, match="has 3 of 4 values"):
        TorchDistReader(folder)


@pytest.mark.parametrize(
    "key",
    [
        "optimizer.state.exp_avg.decoder.layers.mlp.router.weight",
        "chained_1.optimizer.distributed.dp_group_idx_0.gbuf_idx_0."
        "dtype_(torch.bfloat16, torch.float32).param",
        "chained_0.optimizer.state.fp32_param.output_layer.weight",
    ],
)
def test_optimizer_state_is_left_aside_by_rule(key: str, tmp_path: Path) -> None:
    reader = TorchDistReader(one_tensor_checkpoint(tmp_path, key))
    assert not reader.tensors
    assert reader.skipped == {"optimizer state": 1, "common state": 1}


def test_unknown_objects_and_tensors_are_errors(checkpoint_copy: Path, tmp_path: Path) -> None:
    metadata = read_metadata(checkpoint_copy / "release")
    stored = metadata.state_dict_metadata
    stored["modelopt_state/shard_0_1"] = stored["common_state/shard_0_1"]
    (checkpoint_copy / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    not_exported(checkpoint_copy, tmp_path, "modelopt_state/shard_0_1")
    del stored["modelopt_state/shard_0_1"]
    stored["decoder.layers.mlp.router.other_bias"] = stored["decoder.final_layernorm.weight"]
    (checkpoint_copy / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    not_exported(checkpoint_copy, tmp_path, r"router\.other_bias not part of the model")


def one_tensor_checkpoint(folder: Path, key: str, global_shape: tuple[int, ...] = (3,)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    chunk = Chunk(
        key=key,
        global_shape=global_shape,
        offset=(0,),
        extent=(3,),
        dtype=torch.float32,
    )
    write_torch_dist(folder, [[(chunk, torch.ones(3))]])
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_token_files_are_refused_by_their_content(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "archive.npz", ids=numpy.zeros((1, 2), dtype=numpy.int64))
    with pytest.raises(InputError, match=r"an \.npz archive: must be integer token ids"):
        read_tokens(tmp_path / "archive.npz")
    numpy.save(tmp_path / "ids.npy", numpy.array([[2**63, 1]], dtype=numpy.uint64))
    assert read_tokens(tmp_path / "ids.npy").tolist() == [[2**63 - 1, 1]]
