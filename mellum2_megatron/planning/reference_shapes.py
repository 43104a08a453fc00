"""Dense models that inference is compared with, in the terms of our own architecture."""

from __future__ import annotations

from mellum2_megatron.architecture import Mellum2Architecture, RopeParameters

_ROPE = RopeParameters(rope_type="default", rope_theta=1_000_000.0)

QWEN25_7B = Mellum2Architecture(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    # No layer is sparse, so these three mean nothing.
    moe_intermediate_size=128,
    num_experts=1,
    num_experts_per_tok=1,
    sliding_window=None,
    layer_types=("full_attention",) * 28,
    mlp_layer_types=("dense",) * 28,
    rope_full_attention=_ROPE,
    rope_sliding_attention=_ROPE,
    max_position_embeddings=32768,
)
"""Shape of Qwen2.5-7B (config.json of Qwen/Qwen2.5-7B), the report's dense reference (§2.1).

Its biases of queries, keys and values are left out, and our norms of queries and keys are in:
121,856 weights of 7.6 billion.
"""


def dense_counterpart(architecture: Mellum2Architecture) -> Mellum2Architecture:
    """Return the dense model that is to ``architecture`` what Qwen2.5-7B is to Mellum 2's 12B.

    Layers and heads are scaled as 28 : 28 and 28 : 32, the width as 3,584 : 2,304, the MLP as
    18,944 : 3,584. Vocabulary, head dimension and context are the architecture's own, so that the
    two differ in their layers.
    """
    hidden = _multiple(architecture.hidden_size * 3584 / 2304, 8)
    groups = architecture.num_key_value_heads
    return architecture.replace(
        hidden_size=hidden,
        intermediate_size=_multiple(hidden * 18944 / 3584, 8),
        num_attention_heads=_multiple(architecture.num_attention_heads * 28 / 32, groups),
        layer_types=("full_attention",) * architecture.num_hidden_layers,
        mlp_layer_types=("dense",) * architecture.num_hidden_layers,
        moe_intermediate_size=128,
        num_experts=1,
        num_experts_per_tok=1,
        num_mtp_layers=0,
        shared_expert_intermediate_size=None,
    )


def _multiple(value: float, step: int) -> int:
    """Return the multiple of ``step`` nearest to ``value``, at least one ``step``."""
    return max(step, step * round(value / step))
