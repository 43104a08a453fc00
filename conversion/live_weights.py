"""Weights of a Megatron model in training, in the released Hugging Face layout.

The model's own `sharded_state_dict` says which slice of which tensor a rank holds, so this works in
every layout; `mapping.derive` gives the names. The other ways of conversion read checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conversion.mapping import derive, fused_experts
from mellum2_megatron.architecture import to_hf_config
from mellum2_megatron.common.files import write_json

if TYPE_CHECKING:
    from mellum2_megatron.architecture import Mellum2Architecture

Weights = dict[str, torch.Tensor]
"""Tensors on the CPU by their released names."""

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


def gather_weights(model: Sequence[torch.nn.Module], architecture: Mellum2Architecture) -> Weights:
    """Return the weights of a model in training on every rank. A collective of all ranks.

    Every rank holds the whole model for a moment: for models that fit one machine's memory.

    Args:
        model: parts of the model on this rank, wrapped or not.
        architecture: the model.
    """
    whole: Weights = {}
    for key, shape, offset, data in _all_shards(model):
        if key not in whole:
            whole[key] = torch.empty(shape, dtype=data.dtype)
        places = tuple(
            slice(start, start + size) for start, size in zip(offset, data.shape, strict=True)
        )
        whole[key][places] = data
    released: Weights = {}
    for entry in derive(architecture):
        parts = entry.transform.split(whole[entry.key][entry.index], architecture)
        for source, part in zip(entry.sources, parts, strict=True):
            released[source.name] = part
    return released


def _all_shards(
    model: Sequence[torch.nn.Module],
) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """Return key, whole shape, offset and data of the shards of all ranks, each once."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        apply_factories,
        is_main_replica,
    )
    from megatron.core.utils import unwrap_model

    own = []
    for part in unwrap_model(list(model)):
        state: dict[str, Any] = part.sharded_state_dict()
        apply_factories(state)
        for shard in nested_values(state):
            if not isinstance(shard, ShardedTensor) or not is_main_replica(shard.replica_id):
                continue
            data = shard.data.detach().cpu()
            # Axes of layers and experts, one slice each, that the data lack.
            data = data.reshape((1,) * shard.prepend_axis_num + tuple(data.shape))
            own.append((shard.key, tuple(shard.global_shape), tuple(shard.global_offset), data))
    if torch.distributed.get_world_size() == 1:
        return own
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return [shard for shards in gathered for shard in shards]


def new_hf_model(architecture: Mellum2Architecture, dtype: torch.dtype) -> Any:
    """Return transformers' model of an architecture, with weights yet to be loaded."""
    from transformers import MellumConfig, MellumForCausalLM

    config = MellumConfig(**to_hf_config(architecture, torch_dtype="float32"))
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    return MellumForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def load_hf_weights(model: Any, weights: Mapping[str, torch.Tensor], architecture: Any) -> None:
    """Copy released tensors into transformers' model; those of the MTP head have no place there.

    Args:
        model: of `new_hf_model`.
        weights: all of the model's tensors.
        architecture: the model's.
    """
    state = model.state_dict()
    fused = {
        name: piece
        for tensor in fused_experts(architecture).values()
        for name, piece in tensor.slices.items()
    }
    left = set(state)
    for name, value in weights.items():
        if name.startswith("mtp."):
            continue
        if name in state:
            state[name].copy_(value)
            left.discard(name)
        else:
            piece = fused[name]
            state[piece.name][piece.expert, piece.rows].copy_(value)
            left.discard(piece.name)
    assert not left, f"transformers' model has tensors that were not set: {sorted(left)}"


def write_hf_weights(
    folder: Path, weights: Mapping[str, torch.Tensor], architecture: Mellum2Architecture
) -> None:
    """Write config and weights for an inference server that reads the folder."""
    from safetensors.torch import save_file

    from mellum2_megatron.common.files import atomic_path

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, to_hf_config(architecture, torch_dtype="bfloat16"))
    with atomic_path(folder / WEIGHTS_FILE) as path:
        save_file(
            {name: value.contiguous() for name, value in weights.items()},
            str(path),
            metadata={"format": "pt"},
        )
