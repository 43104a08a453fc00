"""Random Hugging Face folders written by transformers, independent of the converter's own table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import MellumConfig, MellumForCausalLM
from transformers.modeling_layers import MtpModel

from conversion.torch_dist.writer import Chunk, TorchDistWriter

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 12,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 128,
    "num_mtp_layers": 1,
    "mtp_layer_types": ["sliding_attention"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

# Each variant changes sizes that a wrong mapping could confuse: heads, groups, experts, layer
# types, MTP.
VARIANTS: dict[str, dict[str, Any]] = {
    "small": {},
    "one_kv_head": {"num_key_value_heads": 1, "num_experts": 5},
    "all_kv_heads": {"num_key_value_heads": 4, "head_dim": 6},
    "seven_experts_one_layer": {
        "num_experts": 7,
        "num_experts_per_tok": 7,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "mtp_layer_types": ["full_attention"],
    },
    "dense_and_sparse": {"mlp_layer_types": ["dense", "sparse", "dense"]},
    "all_dense": {"mlp_layer_types": ["dense"] * 3, "mtp_mlp_layer_types": ["dense"]},
    "no_mtp": {"num_mtp_layers": None, "mtp_layer_types": None},
    "period_2_wide_heads": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 17,
    },
}


def models(changes: dict[str, Any], seed: int = 0) -> tuple[MellumForCausalLM, MtpModel | None]:
    """Return transformers' model and MTP head in float32, all parameters random, norms included."""
    config = MellumConfig(**{**SMALL, **changes})
    generator = torch.Generator().manual_seed(seed)
    main = MellumForCausalLM(config).eval()
    mtp = MtpModel(main, config.num_mtp_layers).eval() if config.num_mtp_layers else None
    with torch.no_grad():
        for module in (main, mtp):
            for name, parameter in [] if module is None else module.named_parameters():
                scale = 0.3 if parameter.dim() > 1 else 0.2
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * scale + ("norm" in name)
                )
    return main, mtp


def mtp_tensors(mtp: MtpModel) -> dict[str, torch.Tensor]:
    """Return the MTP head's tensors by checkpoint name ``mtp.*``, experts fused; hand-renamed."""
    top = {
        "enorm": "pre_fc_norm_embedding",
        "hnorm": "pre_fc_norm_hidden",
        "eh_proj": "fc",
        "post_norm": "norm",
    }
    result = {}
    for name, tensor in mtp.state_dict().items():
        if not name.startswith("layers.0."):
            continue  # the trunk's embedding and head
        first, _, rest = name.removeprefix("layers.0.").partition(".")
        result[f"mtp.layers.0.{rest}" if first == "mtp_block" else f"mtp.{top[first]}.{rest}"] = (
            tensor
        )
    return result


def unfused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with one per expert: gate's rows, then up's, as in ``MellumExperts``."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, rows in enumerate(tensor):
                half = rows.shape[0] // 2
                prefix = name.removesuffix("gate_up_proj") + str(expert)
                result[f"{prefix}.gate_proj.weight"] = rows[:half].clone()
                result[f"{prefix}.up_proj.weight"] = rows[half:].clone()
        elif name.endswith("experts.down_proj"):
            for expert, rows in enumerate(tensor):
                result[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = rows.clone()
        else:
            result[name] = tensor.clone()
    return result


def write_folder(
    folder: Path,
    changes: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    fused: bool = False,
    files: int = 1,
    seed: int = 0,
) -> Path:
    """Write a random model: ``files`` safetensors files, and config.json by transformers."""
    main, mtp = models(changes or {}, seed)
    tensors = {**main.state_dict(), **(mtp_tensors(mtp) if mtp is not None else {})}
    tensors = {name: tensor.to(dtype).clone() for name, tensor in tensors.items()}
    folder.mkdir(parents=True)
    main.config.dtype = str(dtype).removeprefix("torch.")
    main.config.architectures = ["MellumForCausalLM"]
    main.config.save_pretrained(folder)
    save_tensors(folder, tensors if fused else unfused(tensors), files)
    return folder


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], files: int = 1) -> None:
    """Replace the folder's weights, spread over ``files`` files."""
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        old.unlink()
    names = list(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file(
            {name: tensors[name] for name in names[number::files]},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(names[number::files], file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the folder's files by name; there must be some."""
    tensors = {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    assert tensors, f"no tensors in {folder}"
    return tensors


def whole_chunk(key: str, tensor: torch.Tensor) -> Chunk:
    """Return one chunk that covers ``tensor``."""
    shape = tuple(tensor.shape)
    return Chunk(
        key=key,
        global_shape=shape,
        offset=(0,) * tensor.dim(),
        extent=shape,
        dtype=tensor.dtype,
    )


def write_torch_dist(folder: Path, groups: Sequence[Sequence[tuple[Chunk, torch.Tensor]]]) -> None:
    """Write a ``torch_dist`` checkpoint of ``groups``; its common state is empty."""
    writer = TorchDistWriter(folder, [[chunk for chunk, _ in group] for group in groups], common={})
    written = []
    for number, group in enumerate(groups):
        with writer.open_group(number) as file:
            for chunk, tensor in group:
                file.write(chunk.key, chunk.offset, tensor)
        written.append(file.written)
    writer.finish(written)
