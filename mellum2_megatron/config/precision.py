"""Precision of a run: BF16, or BF16 with FP8 matrix multiplications."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mellum2_megatron.common.field_checks import check_fields, require, require_not_negative


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Number formats of a run; the master weights are FP32 in every case.

    The report trains in "BF16 + FP8 hybrid, tensorwise recipe, amax most-recent" (report §3). The
    tensorwise recipe scales by the current amax (largest absolute value). No field sets the amax
    algorithm, because Megatron reads ``--fp8-amax-compute-algo`` for the delayed recipe only
    (megatron/core/fp8_utils.py:733-742, 0.19.2).

    Attributes:
        compute: ``bf16`` (default), or ``fp8`` for FP8 inputs of the linear layers' matrix
            multiplications (GPU and Transformer Engine only). Attention itself stays in BF16.
        fp8_format: ``hybrid`` (default): E4M3 in the forward pass, E5M2 for the gradients of
            outputs. ``e4m3``: E4M3 for both.
        fp8_recipe: choice of the FP8 scales. ``tensorwise`` (default): one for each tensor, from
            its current amax. ``delayed``: one for each tensor, from its amax history.
            ``blockwise``: one for each block.
        fp8_param_gather: all-gather updated weights as FP8 instead of BF16, default false. Refused
            with Muon (rule ``muon-gathers-bf16``).
        bf16_first_layers, bf16_last_layers: number of decoder layers at either end that stay in
            BF16 under FP8 compute, default 0. The router computes in FP32 in every case. The MTP
            layer follows ``compute`` (megatron/core/transformer/multi_token_prediction.py:1180,
            0.19.2).
        bf16_mtp_projection: under FP8 compute, keep in BF16 the matrix in front of the MTP layer,
            which joins hidden state and embedding; default false.
        grad_reduce_in_fp32: accumulate and reduce gradients in FP32, default true.

    Raises:
        InputError: an FP8 setting without FP8 compute, or BF16 layers with the delayed recipe.
    """

    compute: Literal["bf16", "fp8"] = "bf16"
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] = "tensorwise"
    fp8_param_gather: bool = False
    bf16_first_layers: int = 0
    bf16_last_layers: int = 0
    bf16_mtp_projection: bool = False
    grad_reduce_in_fp32: bool = True

    def __post_init__(self) -> None:
        check_fields("precision", self)
        for key, layers in (
            ("precision.bf16_first_layers", self.bf16_first_layers),
            ("precision.bf16_last_layers", self.bf16_last_layers),
        ):
            require_not_negative(key, layers, fix="use 0 for none")
            require(
                not layers or self.compute == "fp8",
                f"{key}={layers} with precision.compute={self.compute}",
                rule="keeps layers of an FP8 model in BF16",
                fix=f"set precision.compute=fp8 or {key}=0",
            )
            require(
                not layers or self.fp8_recipe != "delayed",
                f"{key}={layers} with precision.fp8_recipe=delayed",
                rule="its amax history needs one FP8 context around all layers "
                "(megatron/core/transformer/transformer_config.py:1402, 0.19.2)",
                fix=f"set precision.fp8_recipe=tensorwise or {key}=0",
            )
        require(
            not self.bf16_mtp_projection or self.compute == "fp8",
            f"precision.bf16_mtp_projection=true with precision.compute={self.compute}",
            rule="keeps a matrix of an FP8 model in BF16",
            fix="set precision.compute=fp8 or precision.bf16_mtp_projection=false",
        )
        require(
            not self.fp8_param_gather or self.compute == "fp8",
            f"precision.fp8_param_gather=true with precision.compute={self.compute}",
            rule="FP8 weights are gathered only for FP8 matrix multiplications",
            fix="set precision.compute=fp8 or precision.fp8_param_gather=false",
        )
