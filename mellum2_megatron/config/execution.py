"""Ways to compute the same step in less time or memory; none changes the model that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import check_fields, require, require_positive

Recomputed = Literal["moe_act", "layernorm", "moe"]
Offloaded = Literal[
    "expert_fc1", "moe_act", "qkv_linear", "core_attn", "attn_proj", "attn_norm", "mlp_norm"
]

DETERMINISTIC_VARIABLES: dict[str, tuple[str, ...]] = {
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
}
"""Environment variables of a deterministic run: the accepted values, ours first. Of the first one
several may stand in a list (megatron/training/determinism.py:24-58, 0.19.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """Memory traded for time, and options of single kernels.

    Attributes:
        recompute: activations that the backward pass computes again, default none. ``moe_act``:
            the experts' SwiGLU; ``layernorm``: the norms; ``moe``: the whole expert layer, with
            both of its exchanges of tokens between ranks.
        offload: activations that wait in the memory of the machine, default none: inputs of the
            experts' first product (``expert_fc1``) and of their SwiGLU (``moe_act``), of the
            projection to Q, K and V, of the attention and its output projection, and of the norms.
        gc_interval: steps between two garbage collections of Python, which all ranks then make in
            the same step. None (default): Python collects when it likes, each rank at another time.
        fused_residual_norm: one kernel for the residual sum and the norm behind it, default false.
        pad_expert_tokens: under FP8, have the router give every expert a multiple of the tokens
            that FP8 products need, default false: each product pads by itself.
        deterministic: kernels that add in one order only, default false. The same run on the same
            machines then gives the same bits on GPUs too, at a cost in time.
        extra_arguments: words for Megatron's command line that no key covers, such as
            ``[--log-params-norm]``, default none. A flag that a key covers is
            refused, as is one that another key would contradict.

    Raises:
        InputError: a value outside its range, something named twice, or a combination that
            Megatron refuses.
    """

    recompute: tuple[Recomputed, ...] = ()
    offload: tuple[Offloaded, ...] = ()
    gc_interval: int | None = None
    fused_residual_norm: bool = False
    pad_expert_tokens: bool = False
    deterministic: bool = False
    extra_arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields("execution", self)
        if self.gc_interval is not None:
            require_positive("execution.gc_interval", self.gc_interval, fix="use 100, or null")
        for key, names in (("recompute", self.recompute), ("offload", self.offload)):
            twice = [name for name in names if names.count(name) > 1]
            require(
                not twice,
                f"execution.{key}={','.join(names)}",
                rule=f"{twice[:1]} is there twice",
                fix="name it once",
            )
        inside = sorted({"moe_act", "expert_fc1"} & set(self.offload))
        if "moe" in self.recompute and (inside or "moe_act" in self.recompute):
            raise InputError(
                f"execution.recompute={','.join(self.recompute)} with "
                f"execution.offload={','.join(self.offload)}",
                rule="`moe` computes the whole expert layer again, its inner parts too "
                "(megatron/core/transformer/transformer_config.py:1874, 0.19.2)",
                fix="leave out moe, or moe_act and expert_fc1",
            )
        require(
            "attn_proj" not in self.offload or "core_attn" in self.offload,
            f"execution.offload={','.join(self.offload)}",
            rule="the input of attn_proj is the output of core_attn, whose gradient needs it "
            "(megatron/core/transformer/transformer_config.py:1868, 0.19.2)",
            fix="add core_attn, or leave out attn_proj",
        )
        if self.extra_arguments:
            first = self.extra_arguments[0]
            require(
                first.startswith("--"),
                f"execution.extra_arguments={','.join(self.extra_arguments)}",
                rule="the first word must be a flag of Megatron's command line",
                fix=f"write --{first.lstrip('-')}",
            )
