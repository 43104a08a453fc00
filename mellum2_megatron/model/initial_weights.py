"""Initial weights by name: each tensor has a random generator of its own.

Megatron draws all weights of a rank from one generator, in the order in which modules are built
(megatron/core/tensor_parallel/layers.py:169-230, 0.19.2). A value then depends on the layout, and
on every tensor drawn before it. Here the generator's seed is made of the run's seed, the tensor's
name, its layer and its expert. So every layout starts from equal weights, to the bit, and so do two
models where they have a tensor of the same name and shape.

The names, and each rank's place in a tensor, are those of Megatron's checkpoints
(`sharded_state_dict`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

_METHODS: Mapping[str, str] = {
    "word_embeddings.weight": "embedding_init_method",
    "output_layer.weight": "init_method",
    "linear_qkv.weight": "init_method",
    **{
        f"linear_{part}_proj.weight": "init_method"
        for part in ("q", "q_down", "q_up", "kv_down", "kv_up")
    },
    "linear_proj.weight": "output_layer_init_method",
    "router.weight": "init_method",
    "linear_fc1.weight": "init_method",
    "linear_fc2.weight": "output_layer_init_method",
    "eh_proj.weight": "init_method",
}
"""Megatron's choice of the configuration's init methods, by the end of a tensor's name."""

_LAYER = re.compile(r"layers\.(\d+)\.")


@torch.no_grad()
def draw_by_name(model: MegatronModule, config: TransformerConfig, seed: int) -> None:
    """Draw the random weights of this rank's part of the model anew, each by its name.

    Call it before the optimizer is built, which copies the weights. Constants (norms, a router's
    bias) stay. Torch's own generators are left as they were.

    Args:
        model: a `GPTModel`, or one (virtual) pipeline stage of it, not yet wrapped.
        config: configuration of the model, whose init methods draw.
        seed: seed of the run.

    Raises:
        RuntimeError: a weight that is not constant was not drawn.
    """
    drawn = set()
    for entry in model.sharded_state_dict().values():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue  # other state, such as FP8's
        method = next(
            (name for end, name in _METHODS.items() if entry.key.endswith(f".{end}")),
            _METHODS.get(entry.key),
        )
        if method is None:
            continue
        weight = entry.data
        if isinstance(entry, ShardedTensorFactory):  # gate above up, each divided
            shape_only = torch.empty(weight.shape, device="meta")
            parts = entry.build_fn(entry.key, shape_only, entry.replica_id, entry.flattened_range)
        else:
            parts = [entry]
        name, index = _identity(parts[0])
        whole = _draw(getattr(config, method), seed, name, index, parts[0])
        value = torch.cat([whole[_place(part)] for part in parts])
        weight.copy_(value)
        # Weights that are FP8 from the start keep these values for the optimizer's FP32 copy
        # (megatron/core/optimizer/distrib_optimizer.py:431, 0.19.2).
        if hasattr(weight, "get_high_precision_init_val"):
            weight.get_high_precision_init_val().copy_(value)
        drawn.add(id(weight))
    for name, parameter in model.named_parameters():
        if id(parameter) not in drawn and parameter.min() != parameter.max():
            raise RuntimeError(f"{name}: its initial values are random, but not drawn by name")


def _identity(part: ShardedTensor) -> tuple[str, tuple[int, ...]]:
    """Return a tensor's name without numbers, and the numbers of its layer and expert.

    A checkpoint of equal layers stacks them along an axis of their own; one with dense layers
    numbers them in the name.
    """
    index = tuple(part.global_offset[: part.prepend_axis_num])
    numbers = tuple(int(number) for number in _LAYER.findall(part.key))
    return _LAYER.sub("layers.", part.key), numbers + index


def _draw(
    init_method: Callable[[torch.Tensor], Any],
    seed: int,
    name: str,
    index: tuple[int, ...],
    part: ShardedTensor,
) -> torch.Tensor:
    """Return the whole tensor of one layer and expert, float32 on the CPU."""
    digest = hashlib.sha256(repr((seed, name, index)).encode()).digest()
    whole = torch.empty(part.global_shape[part.prepend_axis_num :], device="cpu")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds the GPUs too.
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        init_method(whole)
    return whole


def _place(part: ShardedTensor) -> tuple[slice, ...]:
    """Return this rank's part of the tensor of one layer and expert."""
    offsets = part.global_offset[part.prepend_axis_num :]
    return tuple(
        slice(start, start + size) for start, size in zip(offsets, part.local_shape, strict=True)
    )
