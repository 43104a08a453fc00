"""Reference of the parity tests: transformers' Mellum, random weights, renamed by hand.

The project's converter is not used, so that a mistake in it cannot hide one in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        return logits, next(self.mtp_logits(source, tokens))

    def mtp_logits(self, hidden: torch.Tensor, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the logits of each MTP layer; those of depth d, from 1, are `[b, s - d, v]`.

        Args:
            hidden: the trunk's hidden state `[b, s, h]`.
            tokens: token ids `[b, s]`.
        """
        for depth in range(1, self.mtp.num_mtp_layers + 1):
            positions = torch.arange(tokens.shape[1] - depth)[None]
            hidden = self.mtp.forward_layer(
                depth - 1, hidden[:, :-1], positions, None, input_ids=tokens[:, depth:]
            )
            yield self.trunk.lm_head(hidden)

    def loss(self, tokens: torch.Tensor, mtp_weight: float) -> torch.Tensor:
        """Return the next token's cross entropy plus `mtp_weight` times the mean of MTP's.

        Args:
            tokens: token ids `[b, s]`.
            mtp_weight: weight of the MTP loss.
        """
        inputs, entropy = tokens[:, :-1], torch.nn.functional.cross_entropy
        hidden = self.trunk.model(inputs, use_cache=False).last_hidden_state
        total = entropy(self.trunk.lm_head(hidden).flatten(0, 1), tokens[:, 1:].flatten())
        if self.mtp is not None:
            for depth, logits in enumerate(self.mtp_logits(hidden, inputs), start=1):
                loss = entropy(logits.flatten(0, 1), tokens[:, 1 + depth :].flatten())
                total = total + mtp_weight / self.mtp.num_mtp_layers * loss
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
    layers = architecture.num_mtp_layers
    described = architecture.replace(num_mtp_layers=min(layers, 1))
    config = MellumConfig(**to_hf_config(described, torch_dtype="float32"))
    config._attn_implementation = "eager"
    trunk = MellumForCausalLM(config)
    if layers > 1:
        # The config refuses more than one layer, MtpModel computes any number.
        config.num_mtp_layers = layers
        config.mtp_layer_types = list(architecture.mtp_layer_types)
        config.mtp_mlp_layer_types = [architecture.mtp_mlp_type] * layers
    mtp = MtpModel(trunk, layers) if layers else None
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
    for depth in range(architecture.num_mtp_layers):
        stacks.append((f"mtp.layers.{depth}.mtp_model_layer.", f"mtp.layers.{depth}.mtp_block."))
        pairs += [
            (f"mtp.layers.{depth}.{ours}.weight", f"mtp.layers.{depth}.{theirs}.weight")
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
        ]
        if is_dense(architecture, ours):
            pairs += [(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight")]
        else:
            pairs += [(f"{ours}mlp.router.weight", f"{theirs}mlp.gate.weight")]
    return pairs


def is_dense(architecture: Mellum2Architecture, prefix: str) -> bool:
    """Return true if the layer with this prefix of Megatron's names has no experts."""
    types = architecture.mlp_layer_types or ("sparse",)
    if prefix.startswith("mtp."):
        return set(types) == {"dense"}
    return types[int(prefix.split(".")[2]) % len(types)] == "dense"


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
    stacks += [
        (f"mtp.layers.{depth}.mtp_model_layer.", f"mtp.layers.{depth}.mtp_block.")
        for depth in range(architecture.num_mtp_layers)
    ]
    per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    d = architecture.head_dim
    for ours, theirs in stacks:
        q, k, v = (tensors[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv")
        rows = []
        for group in range(architecture.num_key_value_heads):
            rows += [q[group * per_group * d : (group + 1) * per_group * d]]
            rows += [k[group * d : (group + 1) * d], v[group * d : (group + 1) * d]]
        result[f"{ours}self_attention.linear_qkv.weight"] = torch.cat(rows)
        if is_dense(architecture, ours):
            gate, up = (tensors[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up"))
            result[f"{ours}mlp.linear_fc1.weight"] = torch.cat((gate, up))
            continue
        for expert in range(architecture.num_experts):
            name = f"{ours}mlp.experts.local_experts.{expert}"
            result[f"{name}.linear_fc1.weight"] = tensors[f"{theirs}mlp.experts.gate_up_proj"][
                expert
            ]
            result[f"{name}.linear_fc2.weight"] = tensors[f"{theirs}mlp.experts.down_proj"][expert]
    return result
