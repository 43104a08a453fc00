"""Rows of latent attention, a variant that transformers' Mellum has no place for.

Scoring reads a checkpoint by them. Their right-hand names are DeepSeek's; an export is refused.

Shape letters: A latent of queries, C latent of keys and values, P rotated key, X queries of all
heads, U unrotated keys and values of all heads, Y values of all heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from conversion.rows import weight_row

if TYPE_CHECKING:
    from mellum2_megatron.architecture import Mellum2Architecture

QUERIES = (
    weight_row("self_attention.linear_q_proj.weight", "X H", ("self_attn.q_proj.weight", "X H")),
)
LATENT_QUERIES = (
    weight_row(
        "self_attention.linear_q_down_proj.weight", "A H", ("self_attn.q_a_proj.weight", "A H")
    ),
    weight_row("self_attention.q_layernorm.weight", "A", ("self_attn.q_a_layernorm.weight", "A")),
    weight_row(
        "self_attention.linear_q_up_proj.weight", "X A", ("self_attn.q_b_proj.weight", "X A")
    ),
)
LATENT_ATTENTION = (
    weight_row("input_layernorm.weight", "H", ("input_layernorm.weight", "H")),
    weight_row(
        "self_attention.linear_kv_down_proj.weight",
        "C+P H",
        ("self_attn.kv_a_proj_with_mqa.weight", "C+P H"),
    ),
    weight_row("self_attention.kv_layernorm.weight", "C", ("self_attn.kv_a_layernorm.weight", "C")),
    weight_row(
        "self_attention.linear_kv_up_proj.weight", "U C", ("self_attn.kv_b_proj.weight", "U C")
    ),
    weight_row("self_attention.linear_proj.weight", "H Y", ("self_attn.o_proj.weight", "H Y")),
)


def latent_sizes(architecture: Mellum2Architecture) -> dict[str, int]:
    """Return the size behind each of this module's letters; none without latent attention."""
    latent, heads = architecture.latent_attention, architecture.num_attention_heads
    if latent is None:
        return {}
    return {
        "A": latent.q_lora_rank or 0,
        "C": latent.kv_lora_rank,
        "P": latent.qk_rope_head_dim,
        "X": heads * latent.qk_head_dim,
        "U": heads * (latent.qk_nope_head_dim + latent.v_head_dim),
        "Y": heads * latent.v_head_dim,
    }
