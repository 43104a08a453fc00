"""Rotary position embedding of one layer type, under the names of ``config.json``; no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from mellum2_megatron.common.field_checks import (
    require,
    require_positive_int,
    require_positive_number,
)

RopeType = Literal["default", "yarn"]
_FACTORS = ("attention_factor", "mscale", "mscale_all_dim")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeParameters:
    """Rotary embedding of one layer type: an entry of ``config.json``'s ``rope_parameters``.

    YaRN (arXiv 2309.00071) is evaluated as in
    ``transformers/modeling_rope_utils.py:_compute_yarn_parameters`` (5.23). All fields except the
    first two belong to YaRN.

    Attributes:
        rope_type: ``default`` or ``yarn``.
        rope_theta: base of the rotation's frequencies.
        factor: context length divided by the original one; None (default) without YaRN.
        original_max_position_embeddings: context length before the extension, in tokens; None
            (default) without YaRN.
        beta_fast: a frequency with more rotations than this over the original context stays as it
            is, default 32.
        beta_slow: a frequency with fewer rotations than this over the original context is
            interpolated, default 1.
        attention_factor: factor on cos and sin; None (default): the paper's, see
            `resolved_attention_factor`.
        mscale, mscale_all_dim: DeepSeek's two terms of that factor; None (default): absent.
        truncate: round the dimensions at both bounds to whole numbers, default true.

    Raises:
        InputError: an unknown ``rope_type``, a YaRN without ``factor`` or
            ``original_max_position_embeddings``, YaRN fields on a default RoPE, or a number that is
            not positive.
    """

    rope_type: RopeType
    rope_theta: float
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        require(
            self.rope_type in get_args(RopeType),
            f"rope_type={self.rope_type!r}",
            rule="Mellum 2 layers use 'default' or 'yarn' RoPE",
            fix="use 'default', or 'yarn' with factor and original_max_position_embeddings",
        )
        # Frequencies are powers of 1 / theta, and YaRN divides by its logarithm.
        require_positive_number("rope.rope_theta", self.rope_theta, most=1e15)
        require(
            self.rope_theta > 1,
            f"rope.rope_theta={self.rope_theta}",
            rule="it must be above 1",
            fix="use 500000",
        )
        require_positive_number("rope.beta_fast", self.beta_fast, most=1e6)
        require_positive_number("rope.beta_slow", self.beta_slow, least=1e-6, most=1e6)
        for name, most in (("factor", 1e6), *((n, 1e3) for n in _FACTORS)):
            value = getattr(self, name)
            if value is not None:
                require_positive_number(f"rope.{name}", value, least=1e-6, most=most)
        require(
            isinstance(self.truncate, bool),
            f"rope.truncate={self.truncate!r}",
            rule="it must be true or false",
            fix="use true",
        )
        if self.rope_type == "yarn":
            require(
                self.factor is not None,
                "rope.factor=None",
                rule="yarn needs its factor",
                fix="give e.g. 16",
            )
            require_positive_int(
                "rope.original_max_position_embeddings", self.original_max_position_embeddings
            )
            require(
                self.beta_fast >= self.beta_slow,
                f"rope.beta_fast={self.beta_fast}",
                rule=f"beta_fast must not be below beta_slow ({self.beta_slow})",
                fix="use 32 and 1",
            )
            return
        # transformers ignores YaRN's fields on a default RoPE, so a set one would be a mistake.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                field.name in ("rope_type", "rope_theta") or value == field.default,
                f"rope.{field.name}={value!r}",
                rule="only rope_type 'yarn' reads it",
                fix="set rope_type='yarn' in the same change, or leave it out",
            )

    @property
    def resolved_attention_factor(self) -> float:
        """Factor on cos and sin, 1.0 for a default RoPE; attention logits get its square."""
        if self.rope_type == "default":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        assert self.factor is not None  # checked in __post_init__
        # DeepSeek's variant, as in transformers: the ratio of the two terms.
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(self.factor, self.mscale) / _yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return _yarn_mscale(self.factor)


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    # YaRN's 0.1 ln(factor) + 1 (arXiv 2309.00071).
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
