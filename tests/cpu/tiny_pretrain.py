"""A tiny stock Megatron run through ``megatron.training.pretrain``, for tests of the CPU backend.

Two layers of Megatron's own `local` spec (MoE, sliding window), one MTP layer, Muon, BF16, random
tokens.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from typing import Any

import torch

SEQUENCE, VOCABULARY = 32, 127
ARGUMENTS = {
    "num-layers": 2,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "group-query-attention": True,
    "num-query-groups": 2,
    "kv-channels": 16,
    "ffn-hidden-size": 64,
    "seq-length": SEQUENCE,
    "max-position-embeddings": SEQUENCE,
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable-bias-linear": True,
    "qk-layernorm": True,
    "untie-embeddings-and-output-weights": True,
    "attention-dropout": 0,
    "hidden-dropout": 0,
    "window-size": "7,0",
    "window-attn-skip-freq": 2,
    "mtp-num-layers": 1,
    "mtp-loss-scaling-factor": 0.1,
    "num-experts": 4,
    "moe-router-topk": 2,
    "moe-ffn-hidden-size": 32,
    "moe-router-dtype": "fp32",
    "moe-router-load-balancing-type": "global_aux_loss",
    "moe-aux-loss-coeff": 1e-3,
    "moe-z-loss-coeff": 1e-3,
    "moe-token-dispatcher-type": "alltoall",
    "optimizer": "muon",
    "use-distributed-optimizer": True,
    "muon-momentum": 0.95,
    "muon-nesterov": True,
    "muon-extra-scale-factor": 0.2,
    "bf16": True,
    "lr": 1e-2,
    "min-lr": 0,
    "weight-decay": 0.1,
    "clip-grad": 1.0,
    "micro-batch-size": 1,
    "global-batch-size": 4,
    "train-iters": 4,
    "lr-decay-style": "constant",
    "eval-iters": 0,
    "eval-interval": 1000,
    "log-interval": 1,
    "save-interval": 1000,
    "num-workers": 0,
    "dataloader-type": "single",
    "tokenizer-type": "NullTokenizer",
    "vocab-size": VOCABULARY,
    "make-vocab-size-divisible-by": 128,
    "transformer-impl": "local",
    "distributed-backend": "gloo",
    "use-cpu-initialization": True,
    "no-gradient-accumulation-fusion": True,
    "no-masked-softmax-fusion": True,
    "no-rope-fusion": True,
    "no-persist-layer-norm": True,
    "no-bias-swiglu-fusion": True,
    "no-bias-dropout-fusion": True,
    "ckpt-format": "torch_dist",
}


def arguments(**changes: Any) -> list[str]:
    """Return `ARGUMENTS` as a command line, with ``changes`` applied; None or False removes."""
    table = ARGUMENTS | {name.replace("_", "-"): value for name, value in changes.items()}
    line: list[str] = []
    for name, value in table.items():
        if value is None or value is False:
            continue
        line += (
            [f"--{name}"]
            if value is True
            else [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        )
    return line


class RandomTokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sample ``i`` is the same on every rank and in every run."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 + int(index))
        text = torch.randint(0, VOCABULARY, (SEQUENCE + 1,), generator=generator)
        return {"tokens": text[:-1], "labels": text[1:]}


def datasets(samples: list[int], vp_stage: int | None = None) -> tuple[RandomTokens, None, None]:
    """The dataset provider: training data only."""
    return RandomTokens(samples[0]), None, None


datasets.is_distributed = True  # type: ignore[attr-defined]


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> torch.nn.Module:
    """Stock GPTModel with the local spec."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = config or core_transformer_config_from_args(args)
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    mtp_spec = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=vp_stage)
    return GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp_spec,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def _loss(
    losses: list[float], output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total = output.float().sum()
    losses.append(total.item())
    tokens = torch.tensor(output.numel(), dtype=torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def forward_step(
    losses: list[float], iterator: Any, model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    """One micro-batch; every pipeline stage reads it."""
    batch = next(iterator)
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)[None, None]
    output = model(tokens, positions, mask, labels=batch["labels"])
    return output, functools.partial(_loss, losses)


def pretrain(**changes: Any) -> dict[str, Any]:
    """Run it here; return micro-batches' ``losses`` (last stage only) and hashes of ``weights``."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    sys.argv = ["tiny_pretrain", *arguments(**changes)]
    args = parse_and_validate_args()
    losses: list[float] = []
    built: list[torch.nn.Module] = []

    def provider(*positional: Any, **keywords: Any) -> torch.nn.Module:
        built.append(model_provider(*positional, **keywords))
        return built[-1]

    try:
        pretrain(
            pretrain_cfg_container_from_args(args),
            datasets,
            ModelType.encoder_or_decoder,
            functools.partial(forward_step, losses),
            model_provider=provider,
        )
    except SystemExit as leaving:  # --exit-interval
        if leaving.code:
            raise
    return {
        "losses": losses,
        "weights": {name: _hash(value) for m in built for name, value in m.state_dict().items()},
    }


def _hash(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(type(value))
    return hashlib.sha256(
        value.detach().contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()[:16]
