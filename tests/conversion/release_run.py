"""One step of Megatron's training loop from an imported release (`test_training_checkpoint`)."""

from __future__ import annotations

from typing import Any

# What tests/cpu/tiny_pretrain's arguments describe.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MODEL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 32,
    "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
}


def train_one_step(release: str, save: str, **arguments: Any) -> None:
    """Load ``release``, take a step with learning rate 0, and save with optimizer state."""
    from mellum2_megatron.checkpoint import find_checkpoint
    from mellum2_megatron.model.provider import model_provider
    from tests.cpu import tiny_pretrain

    provide = model_provider(find_checkpoint(release).architecture, "torch")

    def provider(**positions: Any) -> Any:
        return provide(**{name: value for name, value in positions.items() if name != "config"})

    tiny_pretrain.model_provider = provider
    tiny_pretrain.pretrain(
        load=release, save=save, train_iters=1, lr=0.0, norm_epsilon=1e-6, **arguments
    )
