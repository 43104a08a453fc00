"""Precision of a run: BF16, or BF16 with FP8 matrix multiplications."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mellum2_megatron.common.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """How the numbers of a run are kept; masters of the weights are FP32 in every case.

    The report trains in "BF16 + FP8 hybrid, tensorwise recipe, amax most-recent" (report §3). The
    tensorwise recipe scales by the current amax; Megatron reads ``--fp8-amax-compute-algo`` for the
    delayed recipe only (megatron/core/fp8_utils.py:733-742, 0.19.2), hence no field for it.

    Attributes:
        compute: ``bf16``, or ``fp8`` for FP8 inputs of the linear layers' matrix multiplications
            (GPU and Transformer Engine only). Attention itself stays in BF16.
        fp8_format: ``hybrid`` is E4M3 forward and E5M2 for the gradients of outputs.
        fp8_recipe: one scale a tensor from its current amax (``tensorwise``) or from history
            (``delayed``), or scales a block (``blockwise``).
        fp8_param_gather: all-gather updated weights as FP8 instead of BF16. Refused beside Muon
            (see ``rules.py``).
        bf16_first_layers, bf16_last_layers: so many decoder layers at either end stay in BF16 when
            ``compute`` is ``fp8``. The router computes in FP32 in every case; the MTP layer follows
            ``compute`` (megatron/core/transformer/multi_token_prediction.py:1180, 0.19.2).
        bf16_mtp_projection: of the MTP layer, the matrix that joins hidden state and embedding
            stays in BF16 when ``compute`` is ``fp8``.
        grad_reduce_in_fp32: accumulate and reduce gradients in FP32.

    Raises:
        InputError: a setting of FP8 compute without it, or layers in BF16 beside the delayed
            recipe.
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
        for name in ("bf16_first_layers", "bf16_last_layers"):
            self._check_layers(f"precision.{name}", getattr(self, name))
        if self.bf16_mtp_projection and self.compute != "fp8":
            raise InputError(
                f"precision.bf16_mtp_projection=true with precision.compute={self.compute}",
                rule="keeps a matrix of an FP8 model in BF16",
                fix="set precision.compute=fp8 or precision.bf16_mtp_projection=false",
            )
        if self.fp8_param_gather and self.compute != "fp8":
            raise InputError(
                f"precision.fp8_param_gather=true with precision.compute={self.compute}",
                rule="FP8 weights are gathered only for FP8 matrix multiplications",
                fix="set precision.compute=fp8 or precision.fp8_param_gather=false",
            )

    def _check_layers(self, key: str, layers: int) -> None:
        if layers < 0:
            raise InputError(f"{key}={layers}", rule="must not be negative", fix="use 0 for none")
        if layers and self.compute != "fp8":
            raise InputError(
                f"{key}={layers} with precision.compute={self.compute}",
                rule="keeps layers of an FP8 model in BF16",
                fix=f"set precision.compute=fp8 or {key}=0",
            )
        if layers and self.fp8_recipe == "delayed":
            raise InputError(
                f"{key}={layers} with precision.fp8_recipe=delayed",
                rule="its amax history needs one FP8 context around all layers "
                "(megatron/core/transformer/transformer_config.py:1402, 0.19.2)",
                fix=f"set precision.fp8_recipe=tensorwise or {key}=0",
            )
