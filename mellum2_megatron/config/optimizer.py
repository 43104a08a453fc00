"""What is minimised and how: loss terms, Muon for the matrices, Adam for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mellum2_megatron.architecture import Parameter
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config.layout import is_hidden_matrix


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Terms beside the next-token loss.

    Attributes:
        aux_loss_coef: load-balancing loss of the router (report §3: 1e-3; §5.1: 1e-4 in SFT).
        aux_loss_type: which tokens it balances. ``global_aux_loss`` counts those of all ranks and
            of the step's micro-batches so far (report §3); what it comes to depends on the layout
            (docs/layouts.md). ``aux_loss`` looks at one micro-batch and ``seq_aux_loss`` at one
            sequence, in every layout alike.
        aux_loss_gradient: of the global loss. ``megatron`` divides it by the data-parallel ranks
            once too often (Megatron-LM issue 3672): on 256 of them a coefficient of 1e-3 acts like
            4e-6 on one. ``exact`` is the gradient of the loss that is logged, on any number of
            ranks.
        z_loss_coef: z-loss on the router's logits (report §3: 1e-3).
        mtp_factor: weight of the multi-token-prediction loss (report §2: 0.1).
        per_token: take one mean over all tokens of a step that count, instead of a mean over
            micro-batches (and context-parallel ranks) of their means. The two differ where masks or
            documents leave unequal numbers.
    """

    aux_loss_coef: float = 1e-3
    aux_loss_type: Literal["global_aux_loss", "aux_loss", "seq_aux_loss"] = "global_aux_loss"
    aux_loss_gradient: Literal["megatron", "exact"] = "megatron"
    z_loss_coef: float = 1e-3
    mtp_factor: float = 0.1
    per_token: bool = False

    def __post_init__(self) -> None:
        for name in ("aux_loss_coef", "z_loss_coef", "mtp_factor"):
            _require(
                f"loss.{name}",
                getattr(self, name),
                getattr(self, name) >= 0,
                "must not be negative",
                "use 0 or more",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """Settings of the update; the defaults are the report's (report §3).

    With ``muon`` every two-dimensional weight except embedding and output layer is updated by Muon,
    the rest by Adam, at one learning rate (megatron/core/optimizer/emerging_optimizers.py:128-130,
    0.19.2). State is sharded over the data-parallel ranks in both cases.

    Attributes:
        lr, min_lr: peak and final learning rate.
        muon_momentum: factor of the momentum's moving average; Megatron's own default is 0.9.
        muon_nesterov: Nesterov momentum; off in Megatron by default.
        muon_ns_steps: Newton-Schulz iterations of the orthogonalisation.
        muon_scale_mode: ``spectral`` multiplies the update by ``sqrt(max(rows, columns))``.
        muon_extra_scale: further factor; 0.2 matches the RMS of AdamW's updates (Moonlight, arXiv
            2502.16982, §2.2).
        muon_tp_mode: under tensor parallelism orthogonalise each rank's shard (``blockwise``) or
            the whole matrix.
        muon_split_qkv: orthogonalise Q, K and V separately.
        muon_split_gate_up: orthogonalise an expert's gate and up projections separately; Megatron
            takes the two, which it keeps in one weight, as one matrix. The report does not say.
        muon_router: the routers' weights are Muon's, as in Megatron; false gives them to Adam.
        muon_mtp_projection: likewise the matrix that joins hidden state and embedding in front of
            the MTP layer.
        overlap_grad_reduce, overlap_param_gather: hide communication behind backward and forward.

    Raises:
        InputError: a value outside its range.
    """

    name: Literal["muon", "adam"] = "muon"
    lr: float = 3e-4
    min_lr: float = 0.0
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    muon_momentum: float = 0.95
    muon_nesterov: bool = True
    muon_ns_steps: int = 5
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    muon_extra_scale: float = 0.2
    muon_tp_mode: Literal["blockwise", "duplicated", "distributed"] = "blockwise"
    muon_split_qkv: bool = True
    muon_split_gate_up: bool = False
    muon_router: bool = True
    muon_mtp_projection: bool = True
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True

    def __post_init__(self) -> None:
        _require(
            "optimizer.lr",
            self.lr,
            self.lr > 0,
            "must be positive",
            "the report uses 3e-4 (3e-5 from long context on)",
        )
        _require(
            "optimizer.min_lr",
            self.min_lr,
            0 <= self.min_lr <= self.lr,
            f"must lie between 0 and optimizer.lr={self.lr}",
            f"use 0 to {self.lr}",
        )
        for name in ("muon_momentum", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            _require(
                f"optimizer.{name}",
                value,
                0 <= value < 1,
                "must be at least 0 and below 1",
                "use for example 0.95",
            )
        for name in ("weight_decay", "clip_grad"):
            value = getattr(self, name)
            _require(
                f"optimizer.{name}",
                value,
                value >= 0,
                "must not be negative",
                "use 0 to switch it off",
            )
        for name in ("adam_eps", "muon_extra_scale", "muon_ns_steps"):
            value = getattr(self, name)
            _require(f"optimizer.{name}", value, value > 0, "must be positive", "use the default")
        if self.name == "muon" and self.muon_split_gate_up and not self.muon_split_qkv:
            raise InputError(
                "optimizer.muon_split_gate_up=true with optimizer.muon_split_qkv=false",
                rule="Megatron has one switch for splitting weights before they are orthogonalised "
                "(megatron/core/optimizer/emerging_optimizers.py:294, 0.19.2)",
                fix="set optimizer.muon_split_qkv=true or optimizer.muon_split_gate_up=false",
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise InputError(
                "optimizer.overlap_param_gather=true with optimizer.overlap_grad_reduce=false",
                rule="gathering in the forward pass needs the buckets of the overlapped reduction "
                "(megatron/training/arguments.py:990-995, 0.19.2)",
                fix="set optimizer.overlap_grad_reduce=true or optimizer.overlap_param_gather=false",
            )

    def uses_muon(self, parameter: Parameter) -> bool:
        """Whether Muon updates ``parameter``; Adam does otherwise."""
        choices = {"router": self.muon_router, "mtp projection": self.muon_mtp_projection}
        return (
            self.name == "muon"
            and is_hidden_matrix(parameter)
            and choices.get(parameter.component, True)
        )


def _require(key: str, value: float, holds: bool, rule: str, fix: str) -> None:
    if not holds:
        raise InputError(f"{key}={value}", rule=rule, fix=fix)
