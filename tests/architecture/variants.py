"""Small architectures that differ from each other in every way that the code distinguishes."""

from __future__ import annotations

from typing import Literal

from mellum2_megatron.architecture import PRESETS, RopeParameters

TINY = PRESETS["mellum2-tiny"]
RELEASED = PRESETS["mellum2-12b"]
SLIDING: Literal["sliding_attention"] = "sliding_attention"
FULL: Literal["full_attention"] = "full_attention"

ODD = TINY.replace(  # nothing a multiple of anything else
    vocab_size=331,
    hidden_size=60,
    intermediate_size=7,
    num_hidden_layers=5,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=14,
    moe_intermediate_size=17,
    num_experts=5,
    num_experts_per_tok=3,
    sliding_window=11,
    eos_token_id=(1, 5),
    pad_token_id=2,
)
VARIANTS = {
    "tiny": TINY,
    "odd": ODD,
    "one_expert_per_token": TINY.replace(num_experts_per_tok=1, num_hidden_layers=2),
    "no_mtp": TINY.replace(num_mtp_layers=0, num_hidden_layers=2),
    "full_mtp_layer": TINY.replace(mtp_layer_types=(FULL,)),
    "all_full": TINY.replace(layer_types=(FULL,) * 4, mtp_layer_types=(FULL,), sliding_window=None),
    "dense_and_sparse": TINY.replace(mlp_layer_types=("dense", "sparse") * 2),
    "all_dense": TINY.replace(mlp_layer_types=("dense",) * 4),
    "two_periods_yarn": TINY.replace(
        num_hidden_layers=8,
        norm_topk_prob=False,
        rope_full_attention=RopeParameters(
            rope_type="yarn",
            rope_theta=7e4,
            factor=4.0,
            original_max_position_embeddings=128,
            beta_fast=24.0,
            mscale=1.5,
            mscale_all_dim=0.7,
        ),
    ),
}
