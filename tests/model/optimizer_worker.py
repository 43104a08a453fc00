"""One rank of the optimizer tests: Megatron's own model, wrapper and optimizer.

Weights and gradients are functions of a parameter's global name, so that every layout has the same
model and the same gradients. Only the optimizer runs.
"""

from __future__ import annotations

import re
import sys
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch

from mellum2_megatron.config import Run
from mellum2_megatron.upstream import megatron_arguments
from tests.layouts.traffic import counting

GRADIENT = 1e-3
"""Standard deviation of the gradients; their norm stays below 1, where clipping does nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A rank's part of one weight in its optimizer.

    Attributes:
        start: first element in the flattened weight; 0 for a matrix under Muon, which has one
            owner.
        optimizer: name of the class that updates the part.
        group: learning rate and weight decay.
        values: FP32 master and states, flat, by name.
    """

    start: int
    optimizer: str
    group: dict[str, float]
    values: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """State of one rank after its steps.

    Attributes:
        weights: BF16 weights of the rank's model, by global name.
        parts: the rank's parts of weights in its optimizers, by global name.
        names: local names and shapes, in Megatron's order.
        owned: names of the matrices that each rank of a group owns, as Megatron's optimizer lists
            them, for the groups "dense" and "experts".
        buffers: elements of the gradient buffers under Muon, by the same groups.
    """

    weights: dict[str, torch.Tensor]
    parts: dict[str, Part]
    names: list[tuple[str, tuple[int, ...]]]
    owned: dict[str, list[list[str]]]
    buffers: dict[str, int] = field(default_factory=dict)


def noise(name: str, shape: Any, *, salt: int = 0) -> torch.Tensor:
    """Return a normal tensor that is a function of the name, the shape and ``salt``."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + salt)
    return torch.randn(tuple(shape), generator=generator)


def gradient(name: str, shape: Any, step: int) -> torch.Tensor:
    """Return the gradient of a weight at a step (from 1), averaged over the batch."""
    return noise(name, shape, salt=step) * GRADIENT


def initial(name: str, shape: Any) -> torch.Tensor:
    """Return the initial weight in FP32, of values that BF16 holds exactly."""
    return (noise(name, shape) * 0.02 + (len(tuple(shape)) == 1)).to(torch.bfloat16).float()


def update(run: Run, *, steps: int, precision: str = "medium") -> Outcome:
    """Build the run's model and optimizer on this rank and take ``steps`` steps.

    Args:
        run: a resolved run.
        steps: number of steps.
        precision: precision of Newton-Schulz, as torch names that of FP32 products. "medium" is
            BF16 and Megatron's default.
    """
    chunks, optimizer = _set_up(run, precision)
    buffers: dict[str, int] = {}
    for chunk in chunks:
        for group, of_group in (
            ("dense", chunk.buffers),
            ("experts", chunk.expert_parallel_buffers),
        ):
            for buffer in of_group:
                if buffer.params[0].is_managed_by_layer_wise_optimizer:
                    buffers[group] = buffers.get(group, 0) + buffer.numel
    named = [(name, parameter) for chunk in chunks for name, parameter in _global_names(chunk, run)]
    for step in range(1, steps + 1):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        for name, parameter in named:
            # DDP divides by all data-parallel ranks and adds up those that hold the weight.
            copies = run.layout.ep if ".experts." in name else 1
            parameter.main_grad.copy_(gradient(name, parameter.shape, step) * copies)
        _step(chunks, optimizer, run)
    return Outcome(
        weights={name: parameter.detach().clone() for name, parameter in named},
        parts=_parts(optimizer, dict(named)),
        names=[
            (name, tuple(parameter.shape))
            for chunk in chunks
            for name, parameter in _local_names(chunk)
        ],
        owned=_owned(
            optimizer,
            {parameter: name for chunk in chunks for name, parameter in _local_names(chunk)},
        ),
        buffers=buffers,
    )


def _set_up(run: Run, precision: str) -> tuple[list[Any], Any]:
    from megatron.core.enums import ModelType
    from megatron.training import get_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer

    from mellum2_megatron.model.provider import model_provider
    from mellum2_megatron.muon import even_shares

    even_shares.activate(run.optimizer)
    world_size = torch.distributed.get_world_size()
    sys.argv = ["train", *megatron_arguments(run, world_size=world_size, device="cpu")]
    # The check reports to the forward pass, which does not run here.
    sys.argv.append("--no-check-for-nan-in-loss-and-grad")
    parse_and_validate_args()
    initialize_megatron()
    get_args().iteration = 0
    # Set here, because the command line does not accept "highest".
    get_args().muon_fp32_matmul_prec = precision
    build = model_provider(run.architecture, "torch", run.optimizer)

    def provide(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = build(*args, **kwargs)
        with torch.no_grad():
            for name, parameter in _global_names(model, run):
                parameter.copy_(initial(name, parameter.shape))
        return model

    chunks, optimizer, _ = setup_model_and_optimizer(ModelType.encoder_or_decoder, provide)
    return chunks, optimizer


def _local_names(chunk: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (name.replace("module.", ""), parameter) for name, parameter in chunk.named_parameters()
    ]


def _global_names(chunk: torch.nn.Module, run: Run) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the parameters of a model without pipeline stages, by their names in one process."""
    from megatron.core import parallel_state

    first = (
        parallel_state.get_expert_model_parallel_rank()
        * run.architecture.num_experts
        // run.layout.ep
    )
    pattern = re.compile(r"local_experts\.(\d+)\.")
    return [
        (pattern.sub(lambda match: f"local_experts.{first + int(match[1])}.", name), parameter)
        for name, parameter in _local_names(chunk)
    ]


def _children(optimizer: Any) -> list[Any]:
    """Return the optimizers inside nested chains."""
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is None:
        return [optimizer]
    return [leaf for child in chained for leaf in _children(child)]


def _parts(optimizer: Any, named: dict[str, torch.nn.Parameter]) -> dict[str, Part]:
    """Return the part of each weight in this rank's optimizers."""
    names = {parameter: name for name, parameter in named.items()}
    parts = {}
    for leaf in _children(optimizer):
        sharded = hasattr(leaf, "shard_fp32_from_float16_groups")
        models = leaf.model_float16_groups if sharded else leaf.float16_groups
        masters = leaf.shard_fp32_from_float16_groups if sharded else leaf.fp32_from_float16_groups
        for model, master, settings in zip(
            models, masters, leaf.optimizer.param_groups, strict=True
        ):
            for parameter, value in zip(model, master, strict=True):
                if value is None:
                    continue
                start = leaf._get_model_param_range_map(parameter)["param"].start if sharded else 0
                state = {
                    key: tensor
                    for key, tensor in leaf.optimizer.state[value].items()
                    if torch.is_tensor(tensor)
                }
                parts[names[parameter]] = Part(
                    start=start,
                    optimizer=type(leaf.optimizer).__name__,
                    group={key: settings[key] for key in ("lr", "weight_decay")},
                    values={
                        key: tensor.detach().flatten().clone()
                        for key, tensor in {"master": value, **state}.items()
                    },
                )
    return parts


def _owned(optimizer: Any, names: dict[torch.nn.Parameter, str]) -> dict[str, list[list[str]]]:
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    chained = getattr(optimizer, "chained_optimizers", [])
    layer_wise = next(one for one in chained if isinstance(one, LayerWiseDistributedOptimizer))
    lists = {"dense": layer_wise.dp_cp_params_list, "experts": layer_wise.expt_dp_params_list}
    # None stands for one rank, which owns everything.
    return {
        group: [[names[parameter] for parameter in own] for own in ranks]
        for group, ranks in lists.items()
        if ranks is not None
    }


def _step(chunks: list[Any], optimizer: Any, run: Run) -> None:
    for chunk in chunks:
        if run.optimizer.overlap_grad_reduce:
            chunk.start_grad_sync()
        chunk.finish_grad_sync()
    assert optimizer.step()[0]
    for chunk in chunks:
        if run.optimizer.overlap_param_gather:  # left to the next forward pass otherwise
            chunk.start_param_sync(force_sync=True)


def bytes_of_a_step(run: Run) -> float:
    """Return the bytes that this rank sends in a step to reduce gradients and gather weights."""
    chunks, optimizer = _set_up(run, "medium")
    with counting() as sent:
        _step(chunks, optimizer, run)
    return sent["dp"]


def buffer_bytes(run: Run) -> tuple[int, int]:
    """Return a rank's number of weights, and bytes of Megatron's weight and gradient buffers."""
    chunks, _ = _set_up(run, "medium")
    buffers = [
        buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    held = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    return held, sum(buffer.param_data.nbytes + buffer.grad_data.nbytes for buffer in buffers)
