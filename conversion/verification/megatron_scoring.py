"""Logits of a Megatron Mellum 2, main and MTP, for scoring, verification and tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import atomic_path, check_writable
from mellum2_megatron.config import Backend
from mellum2_megatron.model.scoring import score_tokens

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel


def load_megatron_model(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32
) -> GPTModel:
    """Build the model of a checkpoint in this process and load its weights with Megatron's own
    loader.

    Runs on the GPU where there is one (te backend if Transformer Engine can be imported), else on
    the CPU backend with the torch modules. Any layout that wrote the checkpoint is fine; optimizer
    state in it is left alone.

    Args:
        path: checkpoint folder, or one iteration inside it.
        dtype: of the model's parameters.

    Raises:
        InputError: no checkpoint there, or its tensors are not this architecture's.
    """
    from conversion.convert import open_checkpoint

    checkpoint = find_checkpoint(path)
    open_checkpoint(checkpoint)
    device = _one_rank_world()
    from megatron.core import dist_checkpointing
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from mellum2_megatron.model.provider import build_model

    backend: Backend = "te" if device.type == "cuda" and HAVE_TE else "torch"
    model = build_model(
        checkpoint.architecture,
        backend=backend,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        moe_grouped_gemm=backend == "te",
    )
    model = model.to(device=device, dtype=dtype).eval()
    # Optimizer and random states in the checkpoint are not asked for. Megatron's own strictness
    # levels cannot be used: reading the stored metadata fails with torch 2.15
    # (dist_checkpointing/strategies/torch.py:1022, 0.19.2, passes `TensorProperties.strides` on to
    # `torch.empty`); `open_checkpoint` has compared names and shapes both ways.
    loaded = dist_checkpointing.load(
        {"model": model.sharded_state_dict()}, str(checkpoint.iteration_dir)
    )
    model.load_state_dict(loaded["model"], strict=backend == "torch")
    return model


def _one_rank_world() -> torch.device:
    """Make this process a whole Megatron world of one rank, unless it is already part of one."""
    if not torch.cuda.is_available():
        from mellum2_megatron import cpu

        cpu.activate()
        cpu.init_single_process()
        return torch.device("cpu")
    from mellum2_megatron import upstream

    upstream.activate()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # in memory: no port is taken
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    return torch.device("cuda", torch.cuda.current_device())


def score_file(
    tokens_path: Path, out: Path, *, megatron_path: Path | None, hf_path: Path | None
) -> None:
    """Write the logits of one checkpoint, of either kind, for the tokens of a file (`mellum2
    score`).

    Args:
        tokens_path: `.npy` file of token ids `[b, s]`, any integer type.
        out: `.npz` file to write: `logits` `[b, s, v]` float32 and, with an MTP head, `mtp_logits`
            of the same shape (position t predicts token t + 2; the last position is not
            meaningful).
        megatron_path, hf_path: exactly one of them names the checkpoint.

    Raises:
        InputError: none or both checkpoints, no place to write, unreadable tokens, ids outside the
            vocabulary, or a bad checkpoint.
    """
    from conversion.huggingface.folder import HfFolder
    from conversion.huggingface.scoring import check_tokens, score_hf

    if (megatron_path is None) == (hf_path is None):
        raise InputError(
            "score",
            rule="exactly one checkpoint is scored",
            fix="give either --megatron-path or --hf-path",
        )
    check_writable("--out", out, folder=False)
    if out.exists() and tokens_path.exists() and out.samefile(tokens_path):
        raise InputError(f"--out {out}", rule="is the file of tokens", fix="name another file")
    tokens = read_tokens(tokens_path)
    if hf_path is not None:
        with HfFolder.open(hf_path) as folder:
            check_tokens(tokens, folder.architecture)
        logits, mtp_logits = score_hf(hf_path, tokens)
    else:
        assert megatron_path is not None
        check_tokens(tokens, find_checkpoint(megatron_path).architecture)
        logits, mtp_logits = score_tokens(load_megatron_model(megatron_path), tokens)
    arrays = {"logits": logits.cpu().numpy()}
    if mtp_logits is not None:
        arrays["mtp_logits"] = mtp_logits.cpu().numpy()
    with atomic_path(out) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # a stream: savez would append .npz to a name


def read_tokens(path: Path) -> torch.Tensor:
    """Read token ids `[b, s]` from a `.npy` file.

    Raises:
        InputError: the file cannot be read, or does not hold a two-dimensional integer array.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"--tokens {path}", rule=f"must be a readable .npy file ({error})", fix="use numpy.save"
        ) from None
    if (
        not isinstance(array, np.ndarray)
        or array.ndim != 2
        or array.dtype.kind not in "iu"
        or not array.size
    ):
        shape = getattr(array, "shape", None)
        raise InputError(
            f"--tokens {path}: {getattr(array, 'dtype', type(array))} {shape}",
            rule="must be integer token ids of shape [batch, sequence]",
            fix="save such an array with numpy.save",
        )
    return torch.from_numpy(array.astype(np.int64))
