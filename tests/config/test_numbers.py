"""Every number of a run, unlike its default and unlike all others, found in Megatron's objects.

A number that is not passed on, or that arrives in the place of another, fails here.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from mellum2_megatron.config import Objective, Run, apply_overrides
from mellum2_megatron.recipes import recipe
from tests.upstream.parsed import validated

WORLD = 840  # tp 2 * pp 3 * cp 5 * dp 28

# Key of the run -> its value, and the place where Megatron reads it: `model` (TransformerConfig),
# `optimizer` (OptimizerConfig) or `args`.
NUMBERS: dict[str, tuple[float, str]] = {
    "architecture.vocab_size": (9998, "args.padded_vocab_size"),
    "architecture.hidden_size": (1536, "model.hidden_size"),
    "architecture.intermediate_size": (3584, "model.ffn_hidden_size"),
    "architecture.num_hidden_layers": (24, "model.num_layers"),
    "architecture.num_attention_heads": (30, "model.num_attention_heads"),
    "architecture.num_key_value_heads": (6, "model.num_query_groups"),
    "architecture.head_dim": (48, "model.kv_channels"),
    "architecture.moe_intermediate_size": (448, "model.moe_ffn_hidden_size"),
    "architecture.num_experts": (40, "model.num_moe_experts"),
    "architecture.num_experts_per_tok": (11, "model.moe_router_topk"),
    "architecture.shared_expert_intermediate_size": (
        1344,
        "model.moe_shared_expert_intermediate_size",
    ),
    "architecture.rms_norm_eps": (2e-6, "model.layernorm_epsilon"),
    "architecture.initializer_range": (0.023, "model.init_method_std"),
    "architecture.max_position_embeddings": (2500, "args.max_position_embeddings"),
    "layout.tp": (2, "model.tensor_model_parallel_size"),
    "layout.pp": (3, "model.pipeline_model_parallel_size"),
    "layout.vpp": (4, "model.virtual_pipeline_model_parallel_size"),
    "layout.ep": (8, "model.expert_model_parallel_size"),
    "layout.etp": (7, "model.expert_tensor_parallel_size"),
    "layout.cp": (5, "model.context_parallel_size"),
    "layout.dp": (28, "args.data_parallel_size"),
    "optimizer.lr": (0.031, "optimizer.lr"),
    "optimizer.min_lr": (0.0017, "optimizer.min_lr"),
    "optimizer.weight_decay": (0.13, "optimizer.weight_decay"),
    "optimizer.clip_grad": (0.73, "optimizer.clip_grad"),
    "optimizer.muon_momentum": (0.89, "optimizer.muon_momentum"),
    "optimizer.muon_ns_steps": (9, "optimizer.muon_num_ns_steps"),
    "optimizer.muon_extra_scale": (0.27, "optimizer.muon_extra_scale_factor"),
    "optimizer.adam_beta1": (0.81, "optimizer.adam_beta1"),
    "optimizer.adam_beta2": (0.97, "optimizer.adam_beta2"),
    "optimizer.adam_eps": (3e-9, "optimizer.adam_eps"),
    "loss.aux_loss_coef": (0.0021, "model.moe_aux_loss_coeff"),
    "loss.capacity_factor": (1.6, "model.moe_expert_capacity_factor"),
    "loss.z_loss_coef": (0.0034, "model.moe_z_loss_coeff"),
    "loss.mtp_factor": (0.37, "model.mtp_loss_scaling_factor"),
    "schedule.train_samples": (168_000, "args.train_samples"),
    "schedule.horizon_samples": (336_000, "args.lr_decay_samples"),
    "schedule.warmup_samples": (16_800, "args.lr_warmup_samples"),
    "schedule.decay_samples": (33_600, "args.lr_wsd_decay_samples"),
    "schedule.micro_batch_size": (10, "args.micro_batch_size"),
    "data.sequence_length": (1200, "args.seq_length"),
    "data.workers": (13, "args.num_workers"),
    "logging.log_interval": (14, "args.log_interval"),
    "logging.eval_interval": (170, "args.eval_interval"),
    "logging.eval_iterations": (15, "args.eval_iters"),
    "logging.eval_batch_size": (560, "args.eval_global_batch_size"),
    "checkpoint.save_interval": (190, "args.save_interval"),
    "seed": (4321, "args.seed"),
}
BATCH = 840

# Numbers that our own code reads, and those for which other tests exist.
NOT_MEGATRONS = {
    "layout.dispatcher_sms": "test_every_exchange_and_execution_setting_arrives",
    "execution.gc_interval": "test_every_exchange_and_execution_setting_arrives",
    "loss.head_chunk": "tests/model/test_chunked_head.py",
    "architecture.router_aux_loss_coef": "of config.json; training has loss.aux_loss_coef",
    "architecture.sliding_window": "test_megatrons_config_describes_the_architecture",
    "architecture.num_mtp_layers": "test_megatrons_config_describes_the_architecture",
    "architecture.bos_token_id": "of config.json",
    "architecture.eos_token_id": "test_the_vocabulary_is_not_padded",
    "architecture.pad_token_id": "of config.json",
    "loss.bias_update_rate": "our router, tests/model/test_router_variants.py",
    "precision.bf16_first_layers": "test_layers_stay_in_bf16",
    "precision.bf16_last_layers": "test_layers_stay_in_bf16",
    "schedule.rewarm_at": "our rule resume-keeps-rate-down",
    "stability.spike_factor": "our step guard",
    "stability.spike_window": "our step guard",
    "stability.max_skips": "our step guard",
    "data.seed": "our datasets",
    "data.first_sample": "our datasets",
    "data.phase": "our datasets",
    "data.stream.window": "our streamer",
    "data.stream.timeout_s": "our readers",
    **dict.fromkeys(
        (
            *(f"rl.objective.{name}" for name in Objective.__dataclass_fields__),
            *("rl.ahead", "rl.rounds", "rl.eval_answers", "rl.workers"),
        ),
        "our trainer, tests/rlvr",
    ),
    "logging.sample_interval": "our texts",
    "logging.sample_tokens": "our texts",
    "logging.eval_task_interval": "our tasks",
    "checkpoint.retain_interval": "our saves",
    "checkpoint.keep_last": "our saves",
    "timeout_minutes": "test_fault_settings_arrive",
    "setup_timeout_minutes": "test_fault_settings_arrive",
}


def numbers(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return key -> default of every setting that holds one number or None."""
    found = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            found |= numbers(value, f"{prefix}{field.name}.")
        elif "int" in field.type.split() or "float" in field.type.split():
            found[f"{prefix}{field.name}"] = field.default
    return found


def test_every_number_is_listed() -> None:
    # Of rotation there is no argument: tests/model/test_rotary.py compares with transformers.
    keys = {key for key in numbers(recipe("mellum2_12b_pretrain_phase1")) if ".rope_" not in key}
    assert keys == NUMBERS.keys() | NOT_MEGATRONS.keys()


def test_every_number_is_unlike_its_default_and_the_others() -> None:
    defaults = numbers(recipe("mellum2_12b_pretrain_phase1"))
    counts = Counter([*(value for value, _ in NUMBERS.values()), BATCH])
    assert {value for value, count in counts.items() if count > 1} == set()
    for key, (value, _) in NUMBERS.items():
        assert value != defaults[key], key


def test_every_number_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.training import get_megatron_optimizer_config

    run: Run = apply_overrides(
        recipe("mellum2_12b_pretrain_phase1"),
        [
            *(f"{key}={value}" for key, (value, _) in NUMBERS.items()),
            "architecture.sliding_window=99",
            "layout.sp=true",
            "precision.compute=bf16",
            "backend=torch",
            f"schedule.batch_schedule=[[0,{BATCH}]]",
            "checkpoint.output=/o",
            "checkpoint.retain_interval=null",
        ],
    )
    args = validated(run, monkeypatch, world_size=WORLD, device="cuda")
    objects = {
        "args": args,
        "model": core_transformer_config_from_args(args),
        "optimizer": get_megatron_optimizer_config(args)[0],
    }
    found = {}
    for key, (_, place) in NUMBERS.items():
        name, _, attribute = place.partition(".")
        found[key] = getattr(objects[name], attribute)
    assert found == {key: value for key, (value, _) in NUMBERS.items()}
    assert args.global_batch_size == BATCH
