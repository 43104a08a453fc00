"""Logits of a Megatron checkpoint, main and MTP, on one rank or several.

Each rank loads its part of the weights with Megatron's own loader and writes its part of the
results (`score_folder.ScoreFolder`): its positions of a sequence with context parallelism, its
columns of the vocabulary with tensor parallelism. Nothing is gathered.

The twin of `conversion.huggingface.scoring`. Megatron is imported inside the functions: on a CPU
the CPU backend must be activated first.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from conversion.convert import open_checkpoint
from conversion.exportable import ROUTER_BIAS
from conversion.huggingface.format import torch_dtype
from conversion.verification.layer_errors import EMBEDDING, watch_megatron
from conversion.verification.memory import require_rank_memory
from conversion.verification.ranks import Ranks
from conversion.verification.score_folder import LOGITS, MTP_LOGITS, ScoreFolder
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.config import Backend

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

_JOIN_TIMEOUT = timedelta(hours=2)
"""Longest wait for the other ranks: rank 0 may first run the model in transformers."""


def load_megatron_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks | None = None,
) -> GPTModel:
    """Build this rank's part of a checkpoint's model and load it with Megatron's own loader.

    The checkpoint may have any layout; its optimizer state is not read.

    Args:
        path: checkpoint folder, or one iteration inside it.
        dtype: dtype of the parameters, default float32.
        ranks: processes that hold the model together, default this one alone.

    Raises:
        InputError: no checkpoint at ``path``, or tensors of another architecture.
    """
    ranks = ranks or Ranks()
    checkpoint = find_checkpoint(path)
    # Compares names and shapes both ways. Megatron's strictness levels would too, but they read the
    # stored metadata, which fails with torch 2.15 (dist_checkpointing/strategies/torch.py:1022,
    # 0.19.2, passes `TensorProperties.strides` to `torch.empty`).
    has_router_bias = any(key.endswith(ROUTER_BIAS) for key in open_checkpoint(checkpoint).tensors)
    device = join_world(ranks)
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu

    from mellum2_megatron.model.provider import build_model
    from mellum2_megatron.model.router_variants import enable_router_bias
    from mellum2_megatron.model.transformer_config import transformer_config

    layout, backend = ranks.layout, resolved_backend(ranks, device)
    config = transformer_config(
        checkpoint.architecture,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        cp_comm_type=list(layout.cp_comm_types(checkpoint.architecture)),
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,  # every weight is loaded
        moe_grouped_gemm=backend == "te",  # the torch backend has no grouped GEMM
    )
    if has_router_bias:
        enable_router_bias(config, update_rate=0.0)
    model = build_model(
        checkpoint.architecture,
        backend=backend,
        config=config,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        parallel_output=True,  # logits stay divided, `[s, b, v / tp]`
    )
    model = model.to(device=device, dtype=dtype).eval()
    try:
        loaded = dist_checkpointing.load(
            {"model": model.sharded_state_dict()}, str(checkpoint.iteration_dir)
        )
    # Of all ranks, by rank; it derives from BaseException.
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise InputError(
            f"{checkpoint.iteration_dir}",
            rule=f"its tensors must be readable ({first_line(cause)})",
            fix="copy the checkpoint again, or use an earlier one",
        ) from error
    # Not strict about the `_extra_state` of Transformer Engine's modules, which holds no weight.
    model.load_state_dict(loaded["model"], strict=backend == "torch")
    return model


def resolved_backend(ranks: Ranks, device: torch.device) -> Backend:
    """Return the backend of the model's modules."""
    if ranks.backend is not None:
        return ranks.backend
    # Transformer Engine's context-parallel attention runs in 16 bits only
    # (transformer_engine/pytorch/attention/dot_product_attention/utils.py, 2.20.2).
    exact_context = ranks.layout.cp > 1 and ranks.dtype == "float32"
    if (
        device.type == "cuda"
        and not exact_context
        and importlib.util.find_spec("transformer_engine")
    ):
        return "te"
    return "torch"


def join_world(ranks: Ranks) -> torch.device:
    """Make this process a rank of a Megatron world, unless it is already one.

    With one rank no port is taken. With several the environment names this one, as torchrun's does.

    Returns:
        Device of the rank.
    """
    count, on_gpu = ranks.count, ranks.resolved_device() == "cuda"
    if on_gpu:
        from mellum2_megatron import upstream

        upstream.activate()
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        from mellum2_megatron import cpu  # before megatron, whose imports it patches

        cpu.activate()
    if not torch.distributed.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        if count > 1:
            torch.distributed.init_process_group(backend, timeout=_JOIN_TIMEOUT)
        elif on_gpu:
            # In memory: no port is taken.
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # untyped in torch
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            cpu.init_single_process()
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not mpu.model_parallel_is_initialized():
        layout = ranks.layout
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
        )
        # Megatron's modules need its random state even in evaluation.
        model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@torch.no_grad()
def score_rank(
    path: str | os.PathLike[str], tokens: torch.Tensor, folder: Path, ranks: Ranks
) -> None:
    """Score sequences with this rank's part of a checkpoint, and write its part of the arrays.

    All ranks call this with the same arguments.

    Args:
        path: checkpoint folder, or one iteration inside it.
        tokens: token ids `[b, s]`.
        folder: `ScoreFolder` with the arrays of `score_folder.score_shapes`.
        ranks: the processes.
    """
    architecture = find_checkpoint(path).architecture
    # The first rank joins when it has made the folder.
    device = join_world(ranks)
    scores = ScoreFolder(folder)
    if device.type == "cuda":
        backend = resolved_backend(ranks, device)
        free = torch.cuda.mem_get_info(device)[0]
        require_rank_memory(architecture, ranks, tokens.shape[1], backend=backend, free=free)
    model = load_megatron_model(path, dtype=torch_dtype(ranks.dtype), ranks=ranks)
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from mellum2_megatron.model.context_parallel import partition_indices

    batch, length = tokens.shape
    padded, layout = ranks.padded(length), ranks.layout
    tp_rank, data_rank = mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank()
    data_ranks = mpu.get_data_parallel_world_size()
    held = partition_indices((0, padded), layout.cp, mpu.get_context_parallel_rank())
    # Sequence parallelism divides hidden states once more, logits it does not.
    held_by_layers = held.chunk(layout.tp)[tp_rank]
    # Every data-parallel rank takes part in the exchange of tokens among experts: one without a
    # sequence of its own left repeats the last, and writes nothing.
    turns = math.ceil(batch / data_ranks)
    rows = [turn * data_ranks + data_rank for turn in range(turns)]

    def write(name: str, row: int, positions: torch.Tensor, values: torch.Tensor) -> None:
        inside = positions < length
        columns = values.shape[-1] * tp_rank if name in (LOGITS, MTP_LOGITS) else 0
        kept = values.detach().cpu()[inside]
        scores.write(name, row, positions[inside].tolist(), kept, first_column=columns)

    def forward(row_numbers: Iterator[int], model: GPTModel) -> tuple[torch.Tensor, Any]:
        row, mine = next(row_numbers), True
        if row >= batch:
            row, mine = batch - 1, False
        sequence = torch.nn.functional.pad(tokens[row].long(), (0, padded - length))
        # The head runs for MTP first, then for the trunk: see `model.scoring.score_tokens`. Of
        # several MTP layers the first is kept, as there.
        heads = [*[MTP_LOGITS, *[""] * 3][: architecture.num_mtp_layers], LOGITS]
        with ExitStack() as stack:
            if mine and model.post_process:

                def keep_logits(_module: Any, _inputs: Any, output: Any) -> None:
                    # Written at once: the MTP loss overwrites its logits.
                    if name := heads.pop(0):
                        write(name, row, held, output[0][:, 0])

                hook = model.output_layer.register_forward_hook(keep_logits)
                stack.callback(hook.remove)
            if mine and EMBEDDING in scores.shapes:

                def keep(name: str, values: torch.Tensor) -> None:
                    write(name, row, held_by_layers, values)

                stack.enter_context(watch_megatron(model, keep))
            output = model(sequence[held][None].to(device), held[None].to(device), None)
        return output, _no_result

    # Each stage of a pipeline is at work on another sequence.
    run: Callable[..., Any] = get_forward_backward_func()
    run(
        forward_step_func=forward,
        data_iterator=iter(rows),
        model=model,
        num_microbatches=turns,
        seq_length=padded,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    scores.finish(torch.distributed.get_rank())
    torch.distributed.barrier()


def _no_result(_output: torch.Tensor, *, non_loss_data: bool) -> None:
    """Return nothing for Megatron to collect: hooks have written the results."""
