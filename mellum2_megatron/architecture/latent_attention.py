"""Multi-head latent attention, a variant of the model's attention (arXiv 2405.04434); no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mellum2_megatron.architecture.parameter import Component, Shape
from mellum2_megatron.common.field_checks import require, require_positive_int

_LARGEST = 2**16


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Dimensions of multi-head latent attention, under transformers' names (``DeepseekV3Config``).

    A token's keys and values of all heads are one matrix times one short vector, the latent, which
    is all that inference keeps of it, beside one rotated key that all heads share. A head's query
    and key are ``[qk_nope_head_dim, qk_rope_head_dim]`` wide, and the second part alone is rotated,
    in pairs of neighbours.

    Attributes:
        kv_lora_rank: width of the latent of keys and values.
        q_lora_rank: width of the latent of queries; None (default): queries come from the hidden
            state directly, without a norm, as in DeepSeek-V2-Lite.
        qk_nope_head_dim: width of a head's query and key without rotation.
        qk_rope_head_dim: width of the rotated query and of the rotated key, which heads share.
        v_head_dim: width of a head's value.

    Raises:
        InputError: a width that is not positive, or an odd ``qk_rope_head_dim``.
    """

    kv_lora_rank: int
    q_lora_rank: int | None = None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            require_positive_int(f"latent_attention.{name}", getattr(self, name), most=_LARGEST)
        if self.q_lora_rank is not None:
            require_positive_int("latent_attention.q_lora_rank", self.q_lora_rank, most=_LARGEST)
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"latent_attention.qk_rope_head_dim={self.qk_rope_head_dim}",
            rule="RoPE rotates pairs, so it must be even",
            fix="use an even qk_rope_head_dim",
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def down_widths(self) -> dict[str, int]:
        """Rows of the matrices that make the latents, by the fields that they are sums of."""
        widths = {"kv_lora_rank + qk_rope_head_dim": self.kv_lora_rank + self.qk_rope_head_dim}
        if self.q_lora_rank is not None:
            widths["q_lora_rank"] = self.q_lora_rank
        return {f"latent_attention.{fields}": width for fields, width in widths.items()}

    def dimensions(self, heads: int) -> dict[str, int]:
        """Return the dimensions of the matrices beside the hidden width, by their fields.

        Args:
            heads: query heads.
        """
        sizes = {
            "qk_nope_head_dim + qk_rope_head_dim": self.qk_head_dim,
            "qk_nope_head_dim + v_head_dim": self.qk_nope_head_dim + self.v_head_dim,
            "v_head_dim": self.v_head_dim,
        }
        return {
            "latent_attention.kv_lora_rank": self.kv_lora_rank,
            **self.down_widths,
            **{
                f"num_attention_heads * latent_attention.({fields})": heads * size
                for fields, size in sizes.items()
            },
        }

    def tensors(self, hidden: int, heads: int) -> Iterator[tuple[str, Shape, Component]]:
        """Yield name, shape and component of a layer's tensors, under DeepSeek's names.

        Args:
            hidden: width of the residual stream.
            heads: query heads.
        """
        queries = heads * self.qk_head_dim
        if self.q_lora_rank is None:
            yield "q_proj.weight", (queries, hidden), "attention"
        else:
            yield "q_a_proj.weight", (self.q_lora_rank, hidden), "attention"
            yield "q_a_layernorm.weight", (self.q_lora_rank,), "norms"
            yield "q_b_proj.weight", (queries, self.q_lora_rank), "attention"
        # The latent, then the key that heads share.
        latent, rotated = self.kv_lora_rank, self.qk_rope_head_dim
        yield "kv_a_proj_with_mqa.weight", (latent + rotated, hidden), "attention"
        yield "kv_a_layernorm.weight", (latent,), "norms"
        keys_and_values = heads * (self.qk_nope_head_dim + self.v_head_dim)
        yield "kv_b_proj.weight", (keys_and_values, latent), "attention"
        yield "o_proj.weight", (hidden, heads * self.v_head_dim), "attention"
