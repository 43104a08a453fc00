"""Rotary position embedding of one layer type, as ``config.json`` describes it; no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import require_positive_int, require_positive_number

RopeType = Literal["default", "yarn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeParameters:
    """Rotary embedding of one layer type, with the names of ``config.json``'s ``rope_parameters``
    entries.

    YaRN (arXiv 2309.00071) is evaluated as
    ``transformers/modeling_rope_utils.py:_compute_yarn_parameters`` (5.23) does;
    ``attention_factor=None`` asks for the paper's value, see `resolved_attention_factor`.

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
        if self.rope_type not in get_args(RopeType):
            raise InputError(
                f"rope_type={self.rope_type!r}",
                rule="Mellum 2 layers use 'default' or 'yarn' RoPE",
                fix="use 'default', or 'yarn' with factor and original_max_position_embeddings",
            )
        for name in (
            "rope_theta",
            "factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
        ):
            value = getattr(self, name)
            if value is not None or name in ("rope_theta", "beta_fast", "beta_slow"):
                require_positive_number(f"rope.{name}", value)
        if not isinstance(self.truncate, bool):
            raise InputError(
                f"rope.truncate={self.truncate!r}", rule="it must be true or false", fix="use true"
            )
        if self.rope_type == "yarn":
            if self.factor is None:
                raise InputError(
                    "rope.factor=None", rule="yarn needs its factor", fix="give e.g. 16"
                )
            require_positive_int(
                "rope.original_max_position_embeddings", self.original_max_position_embeddings
            )
            if self.beta_fast < self.beta_slow:
                raise InputError(
                    f"rope.beta_fast={self.beta_fast}",
                    rule=f"beta_fast must not be below beta_slow ({self.beta_slow})",
                    fix="use 32 and 1",
                )
        else:
            self._refuse_yarn_fields()

    def _refuse_yarn_fields(self) -> None:
        for field in dataclasses.fields(self):
            if (
                field.name not in ("rope_type", "rope_theta")
                and getattr(self, field.name) != field.default
            ):
                raise InputError(
                    f"rope.{field.name}={getattr(self, field.name)!r}",
                    rule="only rope_type 'yarn' reads it",
                    fix="set rope_type='yarn' in the same change, or leave it out",
                )

    @property
    def resolved_attention_factor(self) -> float:
        """Factor on cos and sin, hence squared on the attention logits; exactly 1.0 for a default
        RoPE."""
        if self.rope_type == "default":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        assert self.factor is not None
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(self.factor, self.mscale) / _yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return _yarn_mscale(self.factor)


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
