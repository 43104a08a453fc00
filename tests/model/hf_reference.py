"""Reference of the parity tests: transformers' Mellum, random weights, renamed by hand.

The project's converter is not used, so that a mistake in it cannot hide one in the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import MellumConfig, MellumForCausalLM
from transformers.modeling_layers import MtpModel

from mellum2_megatron.architecture import Mellum2Architecture, RopeParameters, to_hf_config

DEFAULT_ROPE = RopeParameters(rope_type="default", rope_theta=500_000.0)
SMALL = Mellum2Architecture(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    moe_intermediate_size=24,
    num_experts=4,
    num_experts_per_tok=2,
    sliding_window=8,
    layer_types=("sliding_attention", "sliding_attention", "sliding_attention", "full_attention"),
    rope_full_attention=DEFAULT_ROPE,
    rope_sliding_attention=DEFAULT_ROPE,
    max_position_embeddings=256,
    num_mtp_layers=1,
    mtp_layer_types=("sliding_attention",),
)
"""Gradients of all parameters take well under a second; the vocabulary is odd on purpose."""


@dataclass
class Reference:
    """Transformers' trunk and MTP layer with shared embedding and head."""

    trunk: MellumForCausalLM
    mtp: MtpModel | None

    def logits(
        self, tokens: torch.Tensor, *, mtp_from_pre_norm: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return main logits `[b, s, v]` and MTP logits `[b, s - 1, v]` (position i: token i + 2).

        Args:
            tokens: token ids `[b, s]`.
            mtp_from_pre_norm: feed MTP the hidden state before the final norm, a wrong reading.
        """
        captured: list[torch.Tensor] = []
        hook = self.trunk.model.norm.register_forward_pre_hook(
            lambda _, args: captured.append(args[0])
        )
        hidden = self.trunk.model(tokens, use_cache=False).last_hidden_state
        hook.remove()
        logits = self.trunk.lm_head(hidden)
        if self.mtp is None:
            return logits, None
        source = captured[0] if mtp_from_pre_norm else hidden
        positions = torch.arange(tokens.shape[1] - 1)[None]
        mtp_hidden = self.mtp.forward_layer(
            0, source[:, :-1], positions, None, input_ids=tokens[:, 1:]
        )
        return logits, self.trunk.lm_head(mtp_hidden)

    def loss(self, tokens: torch.Tensor, mtp_weight: float) -> torch.Tensor:
        """Return the next token's cross entropy plus `mtp_weight` times that of the one after it.

        Args:
            tokens: token ids `[b, s]`.
            mtp_weight: weight of the MTP loss.
        """
        logits, mtp_logits = self.logits(tokens[:, :-1])
        entropy = torch.nn.functional.cross_entropy
        total = entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        if mtp_logits is not None:
            total = total + mtp_weight * entropy(mtp_logits.flatten(0, 1), tokens[:, 2:].flatten())
        return total

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return every parameter once; the MTP layer's own ones under the prefix `mtp.`."""
        named = dict(self.trunk.named_parameters())
        if self.mtp is not None:
            shared = {id(parameter) for parameter in named.values()}
            named |= {f"mtp.{n}": p for n, p in self.mtp.named_parameters() if id(p) not in shared}
        return named


def make_reference(
    architecture: Mellum2Architecture, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Reference:
    """Build transformers' model of `architecture`, every parameter random, norms included."""
    config = MellumConfig(**to_hf_config(architecture, torch_dtype="float32"))
    config._attn_implementation = "eager"
    trunk = MellumForCausalLM(config)
    mtp = MtpModel(trunk, architecture.num_mtp_layers) if architecture.num_mtp_layers else None
    reference = Reference(trunk, mtp)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters().items():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                # Outputs of unit variance make attention and routing sharp enough for a mistake to
                # show.
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    trunk.to(dtype)
    if mtp is not None:
        mtp.to(dtype)
    return reference


def megatron_name_pairs(architecture: Mellum2Architecture) -> list[tuple[str, str]]:
    """Return (Megatron's name, transformers' name) of every tensor that both store alike."""
    pairs = [
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("decoder.final_layernorm.weight", "model.norm.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ]
    stacks = [
        (f"decoder.layers.{i}.", f"model.layers.{i}.")
        for i in range(architecture.num_hidden_layers)
    ]
    if architecture.num_mtp_layers:
        stacks.append(("mtp.layers.0.mtp_model_layer.", "mtp.layers.0.mtp_block."))
        pairs += [
            (f"mtp.layers.0.{ours}.weight", f"mtp.layers.0.{theirs}.weight")
            for ours, theirs in (
                ("enorm", "enorm"),
                ("hnorm", "hnorm"),
                ("eh_proj", "eh_proj"),
                ("final_layernorm", "post_norm"),
            )
        ]
    for ours, theirs in stacks:
        pairs += [
            (f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight"),
            (f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight"),
            (f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight"),
            (f"{ours}self_attention.q_layernorm.weight", f"{theirs}self_attn.q_norm.weight"),
            (f"{ours}self_attention.k_layernorm.weight", f"{theirs}self_attn.k_norm.weight"),
            (f"{ours}mlp.router.weight", f"{theirs}mlp.gate.weight"),
        ]
    return pairs


def to_megatron(
    architecture: Mellum2Architecture, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return transformers' tensors (weights, or their gradients) as the torch backend stores them.

    Megatron fuses queries, keys and values group by group: n / g query heads, a key, a value.
    """
    result = {ours: tensors[theirs] for ours, theirs in megatron_name_pairs(architecture)}
    stacks = [
        (f"decoder.layers.{i}.", f"model.layers.{i}.")
        for i in range(architecture.num_hidden_layers)
    ]
    if architecture.num_mtp_layers:
        stacks.append(("mtp.layers.0.mtp_model_layer.", "mtp.layers.0.mtp_block."))
    per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    d = architecture.head_dim
    for ours, theirs in stacks:
        q, k, v = (tensors[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv")
        rows = []
        for group in range(architecture.num_key_value_heads):
            rows += [q[group * per_group * d : (group + 1) * per_group * d]]
            rows += [k[group * d : (group + 1) * d], v[group * d : (group + 1) * d]]
        result[f"{ours}self_attention.linear_qkv.weight"] = torch.cat(rows)
        for expert in range(architecture.num_experts):
            name = f"{ours}mlp.experts.local_experts.{expert}"
            result[f"{name}.linear_fc1.weight"] = tensors[f"{theirs}mlp.experts.gate_up_proj"][
                expert
            ]
            result[f"{name}.linear_fc2.weight"] = tensors[f"{theirs}mlp.experts.down_proj"][expert]
    return result
