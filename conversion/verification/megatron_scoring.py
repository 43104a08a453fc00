"""Logits of a Megatron checkpoint, main and MTP, for scoring and verification.

The twin of `conversion.huggingface.scoring`. Megatron is imported inside the functions: on a CPU
the CPU backend must be activated first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from conversion.convert import open_checkpoint
from conversion.huggingface.folder import HfFolder
from conversion.huggingface.scoring import check_tokens, score_hf
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
    """Build the model of a checkpoint in this process and load it with Megatron's own loader.

    The model is on the GPU if there is one, with the te backend if Transformer Engine can be
    imported. Otherwise it is on the CPU with the torch backend. The checkpoint may have any layout;
    its optimizer state is not read.

    Args:
        path: checkpoint folder, or one iteration inside it.
        dtype: dtype of the parameters, default float32.

    Raises:
        InputError: no checkpoint at ``path``, or tensors of another architecture.
    """
    checkpoint = find_checkpoint(path)
    # Compares names and shapes both ways. Megatron's strictness levels would too, but they read the
    # stored metadata, which fails with torch 2.15 (dist_checkpointing/strategies/torch.py:1022,
    # 0.19.2, passes `TensorProperties.strides` to `torch.empty`).
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
        perform_initialization=False,  # every weight is loaded
        moe_grouped_gemm=backend == "te",  # the torch backend has no grouped GEMM
    )
    model = model.to(device=device, dtype=dtype).eval()
    loaded = dist_checkpointing.load(
        {"model": model.sharded_state_dict()}, str(checkpoint.iteration_dir)
    )
    # Not strict about the `_extra_state` of Transformer Engine's modules, which holds no weight.
    model.load_state_dict(loaded["model"], strict=backend == "torch")
    return model


def _one_rank_world() -> torch.device:
    """Make this process a Megatron world of one rank, unless it is already part of a world.

    Returns:
        Device of the rank.
    """
    if not torch.cuda.is_available():
        from mellum2_megatron import cpu  # before megatron, whose imports it patches

        cpu.activate()
        cpu.init_single_process()
        return torch.device("cpu")
    from mellum2_megatron import upstream

    upstream.activate()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        # In memory: no port is taken.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # untyped in torch
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        # Megatron's modules need its random state even in evaluation.
        model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    return torch.device("cuda", torch.cuda.current_device())


def score_file(
    tokens_path: Path, out: Path, *, megatron_path: Path | None, hf_path: Path | None
) -> None:
    """Write the logits of one checkpoint, of either kind, for the tokens of a file.

    Args:
        tokens_path: `.npy` file of token ids `[b, s]`, any integer type.
        out: `.npz` file to write: float32 `logits` `[b, s, v]` and, with an MTP head, `mtp_logits`
            of the same shape (position t predicts token t + 2; the last position is undefined).
        megatron_path, hf_path: checkpoint; exactly one of them.

    Raises:
        InputError: no checkpoint or two, no place to write, unreadable tokens, ids outside the
            vocabulary, or a bad checkpoint.
    """
    if (megatron_path is None) == (hf_path is None):
        raise InputError(
            "score",
            rule="exactly one checkpoint is scored",
            fix="give either --megatron-path or --hf-path",
        )
    # Before the model is loaded, which may take minutes.
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
        # To a stream: savez would append .npz to the temporary name.
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # its stubs take allow_pickle for one


def read_tokens(path: Path) -> torch.Tensor:
    """Read token ids `[b, s]` from a `.npy` file.

    Raises:
        InputError: the file cannot be read, or holds no two-dimensional integer array.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"--tokens {path}", rule=f"must be a readable .npy file ({error})", fix="use numpy.save"
        ) from None
    # An .npz archive loads as a mapping.
    is_array = isinstance(array, np.ndarray)
    if not is_array or array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        kind, shape = getattr(array, "dtype", type(array)), getattr(array, "shape", None)
        raise InputError(
            f"--tokens {path}: {kind} {shape}",
            rule="must be integer token ids of shape [batch, sequence]",
            fix="save such an array with numpy.save",
        )
    return torch.from_numpy(array.astype(np.int64))
