"""One rank of the layout tests: a training step without an optimizer, and its outcome.

Megatron's own machinery runs: `initialize_model_parallel`, the real model provider,
`DistributedDataParallel`, `forward_backward_func` and `finalize_model_grads`. Weights are functions
of their names and tokens of a seed, so that every layout starts from the same model and has the
same batch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mellum2_megatron.architecture import Mellum2Architecture, RopeParameters
from tests.layouts.traffic import counting
from tests.training.step_worker import use_arguments

SEQUENCE = 32
BATCH = 4
"""Sequences of the global batch."""

ARCHITECTURE = Mellum2Architecture(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    moe_intermediate_size=32,
    num_experts=4,
    num_experts_per_tok=2,
    sliding_window=7,  # at cp 4 a chunk has 4 positions, so a window touches up to three ranks
    layer_types=("sliding_attention", "sliding_attention", "sliding_attention", "full_attention"),
    rope_full_attention=RopeParameters(
        rope_type="yarn", rope_theta=500_000.0, factor=4.0, original_max_position_embeddings=16
    ),
    rope_sliding_attention=RopeParameters(rope_type="default", rope_theta=500_000.0),
    max_position_embeddings=64,
    num_mtp_layers=1,
    mtp_layer_types=("sliding_attention",),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One step to compare.

    Attributes:
        tp, pp, vpp, ep, etp, cp: the layout; tensor parallelism comes with sequence parallelism.
        micro_batch: sequences of a micro-batch.
        balance: Megatron's type of load-balancing loss, and its coefficient.
        per_token: Megatron's `calculate_per_token_loss`: one mean over all tokens, not a mean of
            micro-batch means.
        documents: real lengths of the documents that each sequence is packed from, each padded to a
            multiple of 8; empty for one document, not packed.
        mask: positions that do not count in the loss.
        other_labels: give the positions that do not count other labels.
        tight: leave out the padding of documents.
        exact: the run's `loss.aux_loss_gradient` is "exact".
        dispatcher: Megatron's token dispatcher of the experts.
        head_chunk: the run's `loss.head_chunk`.
        overlap: the run's `layout.overlap_expert_comm`.
        sequences: sequences of the global batch.
        changes: fields of the architecture that differ from `ARCHITECTURE`.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    micro_batch: int = 1
    balance: tuple[str, float] = ("global_aux_loss", 0.5)
    per_token: bool = False
    documents: tuple[int, ...] = ()
    mask: tuple[int, ...] = ()
    other_labels: bool = False
    tight: bool = False
    exact: bool = False
    dispatcher: str = "alltoall"
    head_chunk: int | None = None
    overlap: bool = False
    sequences: int = BATCH
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def architecture(self) -> Mellum2Architecture:
        """The model."""
        return ARCHITECTURE.replace(**dict(self.changes))

    @property
    def rooms(self) -> list[int]:
        """Positions of each document in the stream, padding included."""
        return [length if self.tight else -(-length // 8) * 8 for length in self.documents]

    @property
    def length(self) -> int:
        """Positions of the stream."""
        return sum(self.rooms) or SEQUENCE


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Outcome of a step on one rank.

    Attributes:
        ranks: the rank's coordinate in each parallelism.
        gradients: gradients of the rank's parameters after all reductions, by global name.
        logits: `[s / cp, v / tp]` by (sequence, "main" or "mtp"); empty off the last stage.
        losses: totals of the whole batch, the same on every rank that has them.
        sent: bytes that the rank sent, by parallelism.
    """

    ranks: dict[str, int]
    gradients: dict[str, torch.Tensor]
    logits: dict[tuple[int, str], torch.Tensor]
    losses: dict[str, torch.Tensor]
    sent: dict[str, float]


# The divided dimension, and the ranks that share it.
SHARDED = {
    "word_embeddings.weight": (0, "tp"),
    "output_layer.weight": (0, "tp"),
    "linear_qkv.weight": (0, "tp"),
    "linear_proj.weight": (1, "tp"),
    "linear_q_proj.weight": (0, "tp"),
    "linear_q_down_proj.weight": (0, "tp"),
    "linear_q_up_proj.weight": (0, "tp"),
    "linear_kv_down_proj.weight": (0, "tp"),
    "linear_kv_up_proj.weight": (0, "tp"),
    "eh_proj.weight": (0, "tp"),
    # Before the experts', whose names end alike.
    "mlp.linear_fc1.weight": (0, "tp"),
    "mlp.linear_fc2.weight": (1, "tp"),
    "shared_experts.linear_fc1.weight": (0, "tp"),
    "shared_experts.linear_fc2.weight": (1, "tp"),
    "linear_fc1.weight": (0, "etp"),
    "linear_fc2.weight": (1, "etp"),
}


def division(name: str) -> tuple[int, str]:
    """Return the divided dimension of a tensor, and the parallelism that divides it, or ""."""
    return next((rule for end, rule in SHARDED.items() if name.endswith(end)), (0, ""))


def shard(name: str, full: torch.Tensor, case: Case, ranks: dict[str, int]) -> torch.Tensor:
    """Return the part of the global tensor ``name`` that the rank at ``ranks`` holds."""
    dimension, axis = division(name)
    if not axis:
        return full
    ways, rank = getattr(case, axis), ranks[axis]
    if name.endswith("linear_fc1.weight"):  # gate above up, each divided
        return torch.cat(
            [half.chunk(ways, dimension)[rank] for half in full.chunk(2, dimension)], dimension
        )
    return full.chunk(ways, dimension)[rank]


def initial_value(
    name: str, local: torch.Tensor, case: Case, ranks: dict[str, int]
) -> torch.Tensor:
    """Return this rank's part of a tensor that is a function of its global name and shape."""
    shape = list(local.shape)
    dimension, axis = division(name)
    if axis:
        shape[dimension] *= getattr(case, axis)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) == 1:
        value = 1 + 0.2 * noise
    elif "word_embeddings" in name:
        value = noise
    else:
        value = noise * shape[-1] ** -0.5
    return shard(name, value, case, ranks)


def global_names(
    chunk: torch.nn.Module, case: Case, ranks: dict[str, int]
) -> dict[str, torch.nn.Parameter]:
    """Return the chunk's parameters under the names that one process would give them."""
    layers = {
        f"decoder.layers.{i}.": layer.layer_number - 1
        for i, layer in enumerate(chunk.decoder.layers)
    }
    local_experts = ARCHITECTURE.num_experts // case.ep
    named = {}
    for name, parameter in chunk.named_parameters():
        for local, number in layers.items():
            if name.startswith(local):
                name = f"decoder.layers.{number}." + name[len(local) :]
                break
        expert = re.search(r"local_experts\.(\d+)\.", name)
        if expert:
            number = int(expert[1]) + ranks["ep"] * local_experts
            name = name.replace(expert[0], f"local_experts.{number}.")
        named[name] = parameter
    return named


def step(case: Case, device: str = "cpu") -> Outcome:
    """Run one forward and backward pass over the batch on this rank."""
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp if case.vpp > 1 else None,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
    )
    model_parallel_cuda_manual_seed(1)
    ranks = {
        "tp": mpu.get_tensor_model_parallel_rank(),
        "pp": mpu.get_pipeline_model_parallel_rank(),
        "ep": mpu.get_expert_model_parallel_rank(),
        "etp": mpu.get_expert_tensor_parallel_rank(),
        "cp": mpu.get_context_parallel_rank(),
        "dp": mpu.get_data_parallel_rank(),
    }
    chunks = build(case, device)
    logits: dict[tuple[int, str], torch.Tensor] = {}
    wrapped = []
    for chunk in chunks:
        with torch.no_grad():
            for name, parameter in global_names(chunk, case, ranks).items():
                parameter.copy_(initial_value(name, parameter, case, ranks))
        config = chunk.config
        wrapped.append(
            DistributedDataParallel(
                config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk
            ).train()
        )
    config.finalize_model_grads_func = finalize_model_grads
    data_ranks = mpu.get_data_parallel_world_size()
    microbatches = case.sequences // case.micro_batch // data_ranks
    feed = functools.partial(batches, case, ranks["dp"], data_ranks, device)
    rows = row_numbers(case, ranks["dp"], data_ranks)
    use_arguments(
        tp=case.tp, pp=case.pp, cp=case.cp, micro_batch=case.micro_batch, length=case.length
    )
    with counting() as sent:
        reported = get_forward_backward_func()(
            forward_step_func=functools.partial(forward_step, logits, rows, case),
            data_iterator=[feed() for _ in wrapped] if case.vpp > 1 else feed(),
            model=wrapped if case.vpp > 1 else wrapped[0],
            num_microbatches=microbatches,
            seq_length=case.length,
            micro_batch_size=case.micro_batch,
            forward_only=False,
        )
    gradients = {}
    for chunk in chunks:
        for name, parameter in global_names(chunk, case, ranks).items():
            assert parameter.grad is None, f"{name}: a gradient outside of DDP's buffers"
            gradients[name] = parameter.main_grad.detach().cpu().clone()
    totals = losses(case, reported, microbatches)
    return Outcome(ranks=ranks, gradients=gradients, logits=logits, losses=totals, sent=dict(sent))


def build(case: Case, device: str, *, seed_by_name: int | None = None) -> list[torch.nn.Module]:
    """Return this rank's model chunks, built by the provider that training uses."""
    from megatron.core import parallel_state as mpu

    from mellum2_megatron.config import Loss
    from mellum2_megatron.model.provider import model_provider
    from mellum2_megatron.model.transformer_config import transformer_config

    kind, coefficient = case.balance
    config = transformer_config(
        case.architecture,
        tensor_model_parallel_size=case.tp,
        sequence_parallel=case.tp > 1,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp if case.vpp > 1 else None,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
        pipeline_dtype=torch.float32,
        # As Megatron's arguments set it: two ranks that send in both directions at once need a
        # group for each direction.
        overlap_p2p_comm=case.vpp > 1,
        batch_p2p_comm=case.vpp == 1,
        use_cpu_initialization=device == "cpu",
        calculate_per_token_loss=case.per_token,
        moe_token_dispatcher_type=case.dispatcher,
        moe_router_load_balancing_type=kind,
        moe_aux_loss_coeff=coefficient,
        moe_z_loss_coeff=0.1,
        mtp_loss_scaling_factor=0.3,
        overlap_moe_expert_parallel_comm=case.overlap,
        bf16=case.overlap,  # Megatron asserts it; weights and activations stay in float32
    )
    loss = Loss(aux_loss_gradient="exact" if case.exact else "megatron", head_chunk=case.head_chunk)
    provide = model_provider(case.architecture, "torch", loss=loss, seed_by_name=seed_by_name)
    chunks = []
    for stage in range(case.vpp):
        where: dict[str, Any] = {
            "ignore_virtual": case.vpp == 1,
            "vp_stage": stage if case.vpp > 1 else None,
        }
        chunk = provide(
            pre_process=mpu.is_pipeline_first_stage(**where),
            post_process=mpu.is_pipeline_last_stage(**where),
            vp_stage=where["vp_stage"],
            config=config,
        )
        chunks.append(chunk.to(device))
    return chunks


def batches(case: Case, rank: int, ranks: int, device: str) -> Iterator[dict[str, Any]]:
    """Yield this data-parallel rank's micro-batches, not yet divided by context parallelism.

    Sequences go to the ranks in turn, in the order of Megatron's sampler.
    """
    text = torch.randint(
        0,
        ARCHITECTURE.vocab_size,
        (case.sequences, SEQUENCE + 1),
        generator=torch.Generator().manual_seed(7),
    )
    mask = torch.ones(case.sequences, SEQUENCE)
    mask[:, list(case.mask)] = 0.0
    places = list(range(SEQUENCE))
    if case.documents:
        spread = dataclasses.replace(case, tight=False).rooms
        starts = list(itertools.accumulate(spread, initial=0))
        real = {
            start + i
            for start, length in zip(starts, case.documents, strict=False)
            for i in range(length)
        }
        mask[:, [place for place in places if place not in real]] = 0.0
        places = sorted(real) if case.tight else places
    text, targets, mask = text[:, :-1][:, places], text[:, 1:][:, places], mask[:, places]
    if case.other_labels:
        targets = torch.where(mask > 0, targets, (targets + 1) % ARCHITECTURE.vocab_size)
    for rows in row_numbers(case, rank, ranks):
        size = len(rows)
        batch = {
            "tokens": text[rows].contiguous(),
            "labels": targets[rows].contiguous(),
            "loss_mask": mask[rows],
            "position_ids": torch.arange(case.length).expand(size, -1).contiguous(),
        }
        if case.documents:
            for name, sizes in (("cu_seqlens", case.documents), ("cu_seqlens_padded", case.rooms)):
                batch[name] = torch.tensor(
                    [list(itertools.accumulate(sizes, initial=0))] * size, dtype=torch.int32
                )
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def row_numbers(case: Case, rank: int, ranks: int) -> Iterator[list[int]]:
    """Yield the sequences of each micro-batch of a data-parallel rank."""
    size = case.micro_batch
    for start in range(rank * size, case.sequences, ranks * size):
        yield list(range(start, start + size))


def forward_step(
    logits: dict[tuple[int, str], torch.Tensor],
    rows: Iterator[Sequence[int]],
    case: Case,
    iterator: Iterator[dict[str, Any]],
    model: torch.nn.Module,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Run one micro-batch as training does, keeping the logits of every head.

    Args:
        logits: place of the logits.
        rows: sequences of each micro-batch that this rank's last stage runs.
        case, iterator, model: the step, its samples, and the stage of the model.
        **kwargs: Megatron's further arguments.
    """
    from megatron.core.utils import get_attr_wrapped_model

    from mellum2_megatron.training.step import forward_step as training_forward_step

    run = functools.partial(
        training_forward_step, iterator, model, documents=bool(case.documents), **kwargs
    )
    if case.head_chunk or case.overlap or not get_attr_wrapped_model(model, "post_process"):
        return run()
    heads: list[torch.Tensor] = []
    # The head runs for MTP first, then for the trunk; the cross entropy overwrites its input.
    head = get_attr_wrapped_model(model, "output_layer")
    hook = head.register_forward_hook(
        lambda _module, _inputs, out: heads.append(out[0].detach().cpu().clone())
    )
    outcome = run()
    hook.remove()
    numbers = next(rows)
    for name, values in zip(("mtp", "main"), heads, strict=True):
        logits |= {(row, name): values[:, i] for i, row in enumerate(numbers)}
    return outcome


def losses(
    case: Case, reported: list[dict[str, torch.Tensor]], microbatches: int
) -> dict[str, torch.Tensor]:
    """Return lm, MTP, auxiliary and z loss as training logs them, the last two by layer."""
    from megatron.core import parallel_state as mpu
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    totals: dict[str, torch.Tensor] = {}
    if mpu.is_pipeline_last_stage(ignore_virtual=True):
        sums = torch.stack([report["lm loss"] for report in reported]).sum(0)
        torch.distributed.all_reduce(
            sums, group=mpu.get_data_parallel_group(with_context_parallel=True)
        )
        totals["lm"] = (sums[0] / sums[1]).cpu()
        MTPLossLoggingHelper.reduce_metrics_in_tracker()
        totals["mtp"] = MTPLossLoggingHelper.tracker["loss_values"].cpu() / microbatches
    tracker = get_moe_metrics_tracker()
    names = (case.balance[0].replace("aux_loss", "load_balancing_loss"), "z_loss")
    tracker._sync_metrics(list(names))
    for ours, theirs in zip(("aux", "z"), names, strict=True):
        totals[ours] = tracker.metrics[theirs].values.cpu() / microbatches
    return totals


def groups(ways: dict[str, int]) -> dict[str, list[int]]:
    """Return the ranks of each of this rank's Megatron groups, by our names."""
    from megatron.core import parallel_state as mpu

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=ways.get("tp", 1),
        pipeline_model_parallel_size=ways.get("pp", 1),
        context_parallel_size=ways.get("cp", 1),
        expert_model_parallel_size=ways.get("ep", 1),
        expert_tensor_parallel_size=ways.get("etp", 1),
    )
    megatron_groups = {
        "tp": mpu.get_tensor_model_parallel_group(),
        "cp": mpu.get_context_parallel_group(),
        "pp": mpu.get_pipeline_model_parallel_group(),
        "dp": mpu.get_data_parallel_group(),
        "dp with cp": mpu.get_data_parallel_group(with_context_parallel=True),
        "ep": mpu.get_expert_model_parallel_group(),
        "etp": mpu.get_expert_tensor_parallel_group(),
        "expert dp": mpu.get_expert_data_parallel_group(),
    }
    return {
        name: torch.distributed.get_process_group_ranks(group)
        for name, group in megatron_groups.items()
    }
