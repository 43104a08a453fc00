"""Loss terms, and the optimizer: Muon for the matrices, Adam for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mellum2_megatron.architecture import Parameter
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import (
    check_fields,
    require,
    require_not_negative,
    require_positive,
    require_positive_number,
)
from mellum2_megatron.config.layout import is_hidden_matrix


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Terms added to the next-token loss, and the loss's mean.

    Attributes:
        aux_loss_coef: coefficient of the router's load-balancing loss, default 1e-3 (report §3;
            §5.1: 1e-4 in SFT).
        aux_loss_type: tokens that the load-balancing loss balances over. ``global_aux_loss``
            (default, report §3): those of all ranks in the step's micro-batches so far; its value
            depends on the layout (docs/layouts.md). ``aux_loss``: one micro-batch.
            ``seq_aux_loss``: one sequence. These two do not depend on the layout. ``none``: no
            load-balancing loss.
        aux_loss_gradient: gradient of ``global_aux_loss``. ``megatron`` (default) divides it by the
            number of data-parallel ranks once too often (Megatron-LM issue 3672): on 256 ranks a
            coefficient of 1e-3 acts like 4e-6 on one. ``exact`` is the gradient of the logged loss
            on any number of ranks.
        bias_update_rate: balancing by a bias on each expert's score, which decides the choice of
            experts only (arXiv 2408.15664; there 1e-3). After a step the bias of an expert with
            fewer tokens than average rises by this rate, that of one with more falls. It works
            beside any ``aux_loss_type``; with ``none`` it balances alone. 0 (default): no bias.
        capacity_factor: room of an expert in each micro-batch and rank, as a multiple of an even
            load; tokens beyond it skip the expert, those with the smallest weights first. None
            (default, report §3): no token is dropped.
        z_loss_coef: coefficient of the z-loss on the router's logits, default 1e-3 (report §3).
        mtp_factor: weight of the multi-token-prediction loss, default 0.1 (report §2).
        per_token: true: one mean over all counted tokens of a step. False (default): the mean of
            the means of micro-batches (and context-parallel ranks). The two differ if these count
            unequal numbers of tokens, because of masks or documents.
        head_chunk: tokens whose logits exist at a time, in both heads, default 2048. Losses and
            gradients are those of all at once to one rounding, in less memory. None: all at once.

    Raises:
        InputError: a value outside its range.
    """

    aux_loss_coef: float = 1e-3
    aux_loss_type: Literal["global_aux_loss", "aux_loss", "seq_aux_loss", "none"] = (
        "global_aux_loss"
    )
    aux_loss_gradient: Literal["megatron", "exact"] = "megatron"
    bias_update_rate: float = 0.0
    capacity_factor: float | None = None
    z_loss_coef: float = 1e-3
    mtp_factor: float = 0.1
    per_token: bool = False
    head_chunk: int | None = 2048

    def __post_init__(self) -> None:
        check_fields("loss", self)
        if self.head_chunk is not None:
            require_positive("loss.head_chunk", self.head_chunk, fix="use 2048, or null")
        for name in ("aux_loss_coef", "z_loss_coef", "mtp_factor"):
            require_not_negative(
                f"loss.{name}", getattr(self, name), fix="use 0 or more", most=1000.0
            )
        # Scores are at most 1, so a larger step would choose the experts by itself.
        require_not_negative("loss.bias_update_rate", self.bias_update_rate, fix="use 1e-3", most=1)
        if self.capacity_factor is not None:
            require_positive("loss.capacity_factor", self.capacity_factor, fix="use 1.25", most=1e3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """Settings of the optimizer; the defaults are the report's (report §3).

    With ``muon`` every two-dimensional weight except embedding and output layer is updated by Muon,
    the rest by Adam, at one learning rate (megatron/core/optimizer/emerging_optimizers.py:128-130,
    0.19.2). State is sharded over the data-parallel ranks in both cases.

    Attributes:
        name: ``muon`` (default), or ``adam`` for all weights.
        lr, min_lr: peak and final learning rate, default 3e-4 and 0.
        weight_decay: decoupled weight decay, default 0.1.
        clip_grad: largest norm of the whole gradient, default 1.0; 0: no clipping.
        muon_momentum: factor of the momentum's moving average, default 0.95 (Megatron's: 0.9).
        muon_nesterov: Nesterov momentum, default true (Megatron's: false).
        muon_ns_steps: Newton-Schulz iterations of the orthogonalisation, default 5.
        muon_scale_mode: scale of the update by the matrix's shape. ``spectral`` (default)
            multiplies by ``sqrt(max(rows, columns))``.
        muon_extra_scale: further factor of the update, default 0.2, which matches the RMS of
            AdamW's updates (Moonlight, arXiv 2502.16982, §2.2).
        muon_tp_mode: orthogonalisation under tensor parallelism. ``blockwise`` (default): each
            rank's shard by itself. ``duplicated``, ``distributed``: the whole matrix.
        muon_split_qkv: orthogonalise Q, K and V separately, default true.
        muon_split_gate_up: orthogonalise an MLP's gate and up projections separately. False
            (default): as one matrix, since Megatron keeps the two in one weight. The report does
            not say.
        muon_router: optimizer of the routers' weights. True (default, as in Megatron): Muon; false:
            Adam.
        muon_mtp_projection: optimizer of the matrix in front of the MTP layer, which joins hidden
            state and embedding. True (default, as in Megatron): Muon; false: Adam.
        muon_dense_shards: division of the buffers of the dense matrices under Muon among the
            data-parallel ranks. ``whole`` (default, as in Megatron): each matrix lies in one rank's
            share, and the rest of the shares is empty. ``even``: shares are equal and nothing is
            empty; a matrix's owner collects its gradient before the update, and hands its weight
            out after it. For 128 ranks and more; 8 ranks lose by it (docs/optimizer.md).
        adam_beta1, adam_beta2: factors of Adam's two moving averages, default 0.9 and 0.95.
        adam_eps: epsilon in Adam's denominator, default 1e-8.
        overlap_grad_reduce: reduce gradients during the backward pass, default true.
        overlap_param_gather: gather weights during the next forward pass, default true.

    Raises:
        InputError: a value outside its range, or a combination that Megatron refuses.
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
    muon_dense_shards: Literal["whole", "even"] = "whole"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True

    def __post_init__(self) -> None:
        check_fields("optimizer", self)
        report = "use 3e-4 as the report does (3e-5 from long context on)"
        require_positive("optimizer.lr", self.lr, fix=report, most=100.0)
        require(
            0 <= self.min_lr <= self.lr,
            f"optimizer.min_lr={self.min_lr}",
            rule=f"must lie between 0 and optimizer.lr={self.lr}",
            fix=f"use 0 to {self.lr}",
        )
        for key, value in (
            ("optimizer.muon_momentum", self.muon_momentum),
            ("optimizer.adam_beta1", self.adam_beta1),
            ("optimizer.adam_beta2", self.adam_beta2),
        ):
            require(
                0 <= value < 1,
                f"{key}={value}",
                rule="must be at least 0 and below 1",
                fix="use for example 0.95",
            )
        off = "use 0 to switch it off"
        require_not_negative("optimizer.weight_decay", self.weight_decay, fix=off)
        require(
            self.lr * self.weight_decay < 1,
            f"optimizer.weight_decay={self.weight_decay} with optimizer.lr={self.lr}",
            rule="a step multiplies the weights by 1 - lr * weight_decay, which must be above 0",
            fix="lower one of the two",
        )
        require_not_negative("optimizer.clip_grad", self.clip_grad, fix=off, most=1e6)
        default = "use the default"
        # Below, the epsilon is 0 in FP32.
        require_positive_number("optimizer.adam_eps", self.adam_eps, least=1e-37, most=1.0)
        require_positive(
            "optimizer.muon_extra_scale", self.muon_extra_scale, fix=default, most=1000.0
        )
        require_positive("optimizer.muon_ns_steps", self.muon_ns_steps, fix=default, most=100)
        # Megatron has one switch for both, so gate and up cannot split without Q, K and V.
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
                fix="set optimizer.overlap_grad_reduce=true "
                "or optimizer.overlap_param_gather=false",
            )

    def uses_muon(self, parameter: Parameter) -> bool:
        """Return true if Muon updates ``parameter``, false if Adam does."""
        # Megatron gives every hidden matrix to Muon; two kinds of matrix have an option here.
        choices = {"router": self.muon_router, "mtp projection": self.muon_mtp_projection}
        return (
            self.name == "muon"
            and is_hidden_matrix(parameter)
            and choices.get(parameter.component, True)
        )
