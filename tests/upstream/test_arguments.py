"""A run's command line, read by Megatron's parser, validation, config and schedule code."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import DETERMINISTIC_VARIABLES, Device, Run, apply_overrides
from mellum2_megatron.planning.extra_arguments import extra_argument_problems
from mellum2_megatron.recipes import recipe, recipe_names
from mellum2_megatron.upstream import (
    environment,
    gpu_environment,
    kept_variables,
    megatron_arguments,
)
from tests import parameter_id

TINY, BIG = "mellum2_tiny_pretrain", "mellum2_12b_pretrain_phase1"


def parsed(run: Run, monkeypatch: pytest.MonkeyPatch, *, world_size: int, device: Device) -> Any:
    """Return the run's command line as Megatron's argparse reads it."""
    from megatron.training.arguments import parse_args

    words = megatron_arguments(run, world_size=world_size, device=device)
    monkeypatch.setattr(sys, "argv", ["train", *words])
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("RANK", "0")
    for name, value in environment(run).items():
        monkeypatch.setenv(name, value)
    return parse_args()


def validated(run: Run, monkeypatch: pytest.MonkeyPatch, *, world_size: int, device: Device) -> Any:
    """The same after Megatron's validation, which also derives values."""
    from megatron.training.arguments import validate_args

    args = parsed(run, monkeypatch, world_size=world_size, device=device)
    validate_args(args)
    return args


def on_cpu(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, *, world_size: int = 2
) -> tuple[Run, Any]:
    run = apply_overrides(recipe(TINY), overrides)
    return run, validated(run, monkeypatch, world_size=world_size, device="cpu")


ARCHITECTURES: list[list[str]] = [
    [],
    ["architecture.num_hidden_layers=6", "architecture.sliding_window=32"],
    ["architecture.num_hidden_layers=3", "architecture.num_mtp_layers=0"],
    [
        "architecture.norm_topk_prob=false",
        "architecture.num_key_value_heads=1",
        "architecture.num_experts=6",
    ],
    [
        "architecture.num_hidden_layers=4",
        "architecture.layer_types=full_attention,sliding_attention,full_attention,sliding_attention",
        "architecture.rms_norm_eps=1e-5",
        "architecture.initializer_range=0.01",
    ],
    ["architecture.num_experts_per_tok=1"],
    ["architecture=mellum2-12b-128k", "schedule.micro_batch_size=1"],
]


@pytest.mark.parametrize("overrides", ARCHITECTURES, ids=parameter_id)
def test_megatrons_config_describes_the_architecture(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.utils import is_layer_window_attention
    from megatron.training.arguments import core_transformer_config_from_args

    run, args = on_cpu(overrides, monkeypatch)
    config = core_transformer_config_from_args(args)
    model = run.architecture
    facts = {
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "kv_channels": model.head_dim,
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_router_topk": model.num_experts_per_tok,
        "moe_router_pre_softmax": not model.norm_topk_prob or model.num_experts_per_tok == 1,
        "moe_expert_capacity_factor": None,
        "moe_shared_expert_intermediate_size": None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 1e-3,
        "moe_z_loss_coeff": 1e-3,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.rms_norm_eps,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": model.initializer_range,
        "mtp_num_layers": model.num_mtp_layers or None,
        "bf16": True,
        "fp8": None,
        "expert_model_parallel_size": 2,
    }
    assert {name: getattr(config, name) for name in facts} == facts
    if model.num_mtp_layers:
        assert config.mtp_loss_scaling_factor == 0.1
    assert config.window_size == (model.sliding_window - 1, 0)  # type: ignore[operator]
    slides = [
        is_layer_window_attention(config.window_size, config.window_attn_skip_freq, number + 1)
        for number in range(model.num_hidden_layers)
    ]
    assert slides == [kind == "sliding_attention" for kind in model.layer_types]
    assert args.untie_embeddings_and_output_weights
    assert args.position_embedding_type == "rope"


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (
            ["architecture.mlp_layer_types=[dense,sparse]"],
            {"moe_layer_freq": [0, 1, 0, 1], "num_moe_experts": 8, "ffn_hidden_size": 512},
        ),
        (
            ["architecture.mlp_layer_types=[dense]", "layout.ep=1"],
            {"moe_layer_freq": 1, "num_moe_experts": None, "ffn_hidden_size": 512},
        ),
        (
            ["architecture.shared_expert_intermediate_size=96"],
            {"moe_layer_freq": 1, "moe_shared_expert_intermediate_size": 96},
        ),
        (
            [
                "architecture.latent_attention={kv_lora_rank: 48, q_lora_rank: 40, "
                "qk_nope_head_dim: 24, qk_rope_head_dim: 16, v_head_dim: 32}"
            ],
            {
                "multi_latent_attention": True,
                "kv_lora_rank": 48,
                "q_lora_rank": 40,
                "qk_head_dim": 24,
                "qk_pos_emb_head_dim": 16,
                "v_head_dim": 32,
                "rope_type": "rope",
                "num_query_groups": 4,
                "apply_rope_fusion": False,
            },
        ),
    ],
    ids=["dense_and_sparse", "all_dense", "shared_expert", "latent_attention"],
)
def test_variants_reach_the_config(
    overrides: list[str], facts: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(on_cpu(overrides, monkeypatch)[1])
    assert {name: getattr(config, name) for name in facts} == facts


@pytest.mark.parametrize("kind", ["global_aux_loss", "aux_loss", "seq_aux_loss", "none"])
@pytest.mark.parametrize("per_token", [False, True])
def test_loss_settings_reach_the_config(
    kind: str, per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training.arguments import core_transformer_config_from_args

    overrides = [f"loss.aux_loss_type={kind}", f"loss.per_token={str(per_token).lower()}"]
    overrides.append("loss.capacity_factor=1.5")
    config = core_transformer_config_from_args(on_cpu(overrides, monkeypatch)[1])
    facts = (
        config.moe_router_load_balancing_type,
        config.calculate_per_token_loss,
        config.moe_expert_capacity_factor,
    )
    assert facts == (kind, per_token, 1.5)


@pytest.mark.parametrize(
    ("vocabulary", "layout"), [(4096, []), (4099, []), (5000, ["layout.pp=2", "layout.ep=1"])]
)
def test_the_vocabulary_is_not_padded(
    vocabulary: int, layout: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    run, args = on_cpu([f"architecture.vocab_size={vocabulary}", *layout], monkeypatch)
    tokenizer = build_tokenizer(args)
    assert args.padded_vocab_size == vocabulary
    assert tokenizer.vocab_size == vocabulary
    assert tokenizer.eod == run.architecture.eos_token_id


def test_the_optimizer_is_layer_wise_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

    args = validated(recipe(BIG), monkeypatch, world_size=256, device="cuda")
    config, _ = get_megatron_optimizer_config(args)
    facts = {
        "optimizer": "muon",
        "lr": 3e-4,
        "min_lr": 0.0,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "muon_momentum": 0.95,
        "muon_nesterov": True,
        "muon_num_ns_steps": 5,
        "muon_scale_mode": "spectral",
        "muon_extra_scale_factor": 0.2,
        "muon_tp_mode": "blockwise",
        "muon_coefficient_type": "quintic",
        "muon_split_qkv": True,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_eps": 1e-8,
        "use_layer_wise_distributed_optimizer": True,
        "bf16": True,
        "overlap_param_gather": True,
    }
    assert {name: getattr(config, name) for name in facts} == facts
    ddp = get_megatron_ddp_config(args)
    assert ddp.grad_reduce_in_fp32
    assert ddp.overlap_grad_reduce
    assert ddp.overlap_param_gather


def test_adam_is_sharded_and_settings_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.training import get_megatron_optimizer_config

    changes = [
        "optimizer.name=adam",
        "optimizer.adam_beta1=0.5",
        "optimizer.adam_eps=1e-6",
        "optimizer.clip_grad=0",
    ]
    _, args = on_cpu([*changes, "precision.grad_reduce_in_fp32=false"], monkeypatch)
    config, _ = get_megatron_optimizer_config(args)
    assert (config.optimizer, config.adam_beta1, config.adam_eps, config.clip_grad) == (
        "adam",
        0.5,
        1e-6,
        0.0,
    )
    assert args.use_distributed_optimizer
    assert not args.accumulate_allreduce_grads_in_fp32
    muon = [
        "optimizer.muon_nesterov=false",
        "optimizer.muon_split_qkv=false",
        "optimizer.muon_ns_steps=3",
    ]
    _, args = on_cpu(muon, monkeypatch)
    config, _ = get_megatron_optimizer_config(args)
    assert (config.muon_nesterov, config.muon_split_qkv, config.muon_num_ns_steps) == (
        False,
        False,
        3,
    )


def test_the_12b_is_accepted_as_the_report_trains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    args = validated(recipe(BIG), monkeypatch, world_size=256, device="cuda")
    facts = {
        "data_parallel_size": 256,
        "expert_model_parallel_size": 8,
        "micro_batch_size": 2,
        "eval_global_batch_size": 4096,
        "seq_length": 8192,
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "fp8_param_gather": False,
        "transformer_impl": "transformer_engine",
        "moe_grouped_gemm": True,
        "moe_router_fusion": True,
        "moe_permute_fusion": True,
        "apply_rope_fusion": True,
        "ckpt_format": "torch_dist",
        "rotary_base": 500_000,
        "padded_vocab_size": 98_304,
        "tensorboard_dir": None,
        "use_cpu_initialization": None,
        "distributed_backend": "nccl",
    }
    assert {name: getattr(args, name) for name in facts} == facts


@pytest.mark.parametrize(
    ("first", "last", "given"), [(0, 0, False), (2, 0, True), (0, 1, True), (3, 2, True)]
)
def test_layers_stay_in_bf16(
    first: int, last: int, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [f"precision.bf16_first_layers={first}", f"precision.bf16_last_layers={last}"]
    args = validated(
        apply_overrides(recipe(BIG), changes), monkeypatch, world_size=256, device="cuda"
    )
    assert args.first_last_layers_bf16 == given
    if given:
        assert (args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16) == (first, last)


@contextlib.contextmanager
def megatron_scheduler(
    args: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, dict[str, Any], Any]]:
    """Yield Megatron's scheduler, parameter group and batch calculator, set up as by `pretrain`."""
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.training import training

    monkeypatch.setattr(training, "get_args", lambda: args)
    # As set_global_variables does (megatron/training/global_vars.py:127).
    calculator.init_num_microbatches_calculator(
        rank=1,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
        step_batch_size_schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )
    try:
        group: dict[str, Any] = {}
        yield (
            training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[group])),
            group,
            calculator,
        )
    finally:
        calculator.destroy_num_microbatches_calculator()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "schedule.batch_schedule=[[0,16]]",
            "schedule.train_samples=1600",
            "schedule.decay_samples=400",
        ],
        ["schedule.style=cosine", "schedule.decay_samples=0", "optimizer.min_lr=1e-5"],
        ["schedule.horizon_samples=9280", "schedule.warmup_samples=0"],
    ],
    ids=parameter_id,
)
def test_megatron_walks_the_runs_schedule(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step's batch and rate come from Megatron's own calculator and scheduler."""
    run, args = on_cpu(overrides, monkeypatch)
    with megatron_scheduler(args, monkeypatch) as (scheduler, group, calculator):
        assert args.train_iters == run.schedule.train_steps
        consumed = 0
        for _ in range(args.train_iters):
            calculator.update_num_microbatches(consumed)
            batch = calculator.get_current_global_batch_size()
            assert group["lr"] == run.learning_rate(consumed)
            assert batch == run.schedule.batch_size(consumed)
            consumed += batch
            scheduler.step(batch)
        assert consumed == run.schedule.train_samples


def test_layout_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [
        "layout.dp=null",
        "layout.tp=2",
        "layout.sp=true",
        "layout.pp=2",
        "layout.vpp=2",
        "layout.cp=2",
    ]
    changes += ["layout.ep=4", "layout.etp=2", "layout.dispatcher=flex"]
    run = apply_overrides(
        recipe(BIG), [*changes, "architecture.num_hidden_layers=8", "precision.compute=bf16"]
    )
    args = validated(run, monkeypatch, world_size=32, device="cuda")
    facts = {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "context_parallel_size": 2,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 2,
        "data_parallel_size": 4,
        "moe_token_dispatcher_type": "flex",
        "cp_comm_type": ["all_gather", "all_gather", "all_gather", "p2p"] * 2,
    }
    assert {name: getattr(args, name) for name in facts} == facts
    assert run.layout.data_parallel(32) == 4
    assert args.moe_flex_dispatcher_backend == "hybridep"
    assert environment(run) == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert environment(recipe(BIG)) == {}
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in gpu_environment(run), "Megatron's wins"


EXCHANGE = [
    "layout.dispatcher=flex",
    "layout.dispatcher_backend=deepep",
    "layout.dispatcher_sms=24",
    "layout.overlap_expert_comm=true",
    "layout.delay_wgrad=true",
    "execution.recompute=layernorm,moe_act",
    "execution.offload=core_attn,attn_proj",
    "execution.gc_interval=77",
    "execution.fused_residual_norm=true",
    "execution.pad_expert_tokens=true",
    "execution.extra_arguments=[--log-params-norm]",
]


def stub_te(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Megatron's validation find Transformer Engine 2.20.2, which tests hide."""
    import megatron.core.transformer.transformer_config as config
    from megatron.core.extensions import transformer_engine
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils
    from packaging.version import Version

    version = Version("2.20.2")
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and hasattr(module, "is_te_min_version"):
            monkeypatch.setattr(
                module, "is_te_min_version", lambda least, **_: version >= Version(least)
            )
    monkeypatch.setattr(config, "get_te_version", lambda: version)
    for module in (rope_utils, transformer_engine, moe_utils):
        for name, value in list(vars(module).items()):
            if name.startswith("fused_") and value is None:
                monkeypatch.setattr(module, name, object())


def test_every_exchange_and_execution_setting_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import core_transformer_config_from_args

    stub_te(monkeypatch)
    run = apply_overrides(recipe(BIG), EXCHANGE)
    args = validated(run, monkeypatch, world_size=256, device="cuda")
    assert (args.manual_gc, args.manual_gc_interval) == (True, 77)
    assert args.log_params_norm
    config = core_transformer_config_from_args(args)
    facts = {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "deepep",
        "moe_flex_dispatcher_num_sms": 24,
        "overlap_moe_expert_parallel_comm": True,
        "delay_wgrad_compute": True,
        "recompute_granularity": "selective",
        "recompute_modules": ["layernorm", "moe_act"],
        "fine_grained_activation_offloading": True,
        "offload_modules": ["core_attn", "attn_proj"],
        "fused_residual_rmsnorm": True,
        "moe_router_padding_for_quantization": True,
    }
    assert {name: getattr(config, name) for name in facts} == facts
    assert environment(run) == {"NVTE_CPU_OFFLOAD_V1": "1"}
    assert gpu_environment(run) == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_GRAPH_REGISTER": "0",
        "NVTE_FWD_LAYERNORM_SM_MARGIN": "20",
        "NVTE_BWD_LAYERNORM_SM_MARGIN": "20",
    }


def test_a_variable_that_wins_over_ours_is_told() -> None:
    """An image of NVIDIA's may hold one connection, which undoes the overlap in silence."""
    run = apply_overrides(recipe(BIG), ["layout.overlap_expert_comm=true"])
    assert kept_variables(run, gpu_environment(run)) == []
    (line,) = kept_variables(run, {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "HOME": "/root"})
    assert line == (
        "environment: CUDA_DEVICE_MAX_CONNECTIONS=1 is set and stays; these settings want 32"
    )


def test_deterministic_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import determinism

    stub_te(monkeypatch)
    for name in DETERMINISTIC_VARIABLES:
        monkeypatch.setenv(name, DETERMINISTIC_VARIABLES[name][0])
    run = apply_overrides(recipe(BIG), ["execution.deterministic=true"])
    try:
        assert validated(run, monkeypatch, world_size=256, device="cuda").deterministic_mode
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not validated(recipe(BIG), monkeypatch, world_size=256, device="cuda").deterministic_mode
    ours = {name: gpu_environment(run)[name] for name in DETERMINISTIC_VARIABLES}
    assert ours == determinism.DETERMINISM_ENV_VAR_DEFAULTS
    accepted = {name: set(values) for name, values in DETERMINISTIC_VARIABLES.items()}
    assert accepted == {
        "NCCL_ALGO": set(determinism.ACCEPTED_NCCL_ALGO_TOKENS),
        **{name: set(values) for name, values in determinism.ACCEPTED_ENV_VAR_VALUES.items()},
    }


@pytest.mark.parametrize("name", [name for name in recipe_names() if "gpu" in name])
def test_megatron_accepts_every_gpu_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import core_transformer_config_from_args

    stub_te(monkeypatch)
    run = recipe(name)
    assert run.layout.world_size is not None
    args = validated(run, monkeypatch, world_size=run.layout.world_size, device="cuda")
    config = core_transformer_config_from_args(args)
    assert config.overlap_moe_expert_parallel_comm == run.layout.overlap_expert_comm


def test_the_table_of_covered_flags_is_that_of_the_code() -> None:
    import inspect
    import re

    from mellum2_megatron.planning.extra_arguments import CONTRADICTING, COVERED
    from mellum2_megatron.upstream import arguments

    assert set(re.findall(r'"--([a-z0-9-]+)"', inspect.getsource(arguments))) == COVERED
    assert not COVERED & CONTRADICTING


def test_an_unknown_word_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from mellum2_megatron.training.loop import parse_arguments

    run = apply_overrides(recipe(TINY), ["execution.extra_arguments=[--no-such-flag]"])
    monkeypatch.setattr(
        sys, "argv", ["train", *megatron_arguments(run, world_size=2, device="cpu")]
    )
    with pytest.raises(InputError, match="unrecognized arguments: --no-such-flag"):
        parse_arguments(run)


def test_contradicting_flags_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that Megatron has renamed would no longer be refused."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from mellum2_megatron.planning.extra_arguments import CONTRADICTING, COVERED, OTHER_MODELS

    parser = add_megatron_arguments(argparse.ArgumentParser(conflict_handler="resolve"))
    known = {option for action in parser._actions for option in action.option_strings}
    assert {f"--{name}" for name in CONTRADICTING | OTHER_MODELS} <= known
    # Other names of the flags that keys set.
    tiny = recipe(TINY)
    for action in parser._actions:
        if not {f"--{name}" for name in COVERED}.isdisjoint(action.option_strings):
            for option in action.option_strings:
                run = apply_overrides(tiny, [f"execution.extra_arguments=[{option}]"])
                assert list(extra_argument_problems(run)), option


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        (["layout.tp=3", "layout.sp=true"], 3),
        (["layout.pp=3"], 3),
        (["layout.ep=3"], 3),
        (["layout.cp=3"], 3),
        (["layout.tp=2", "layout.sp=true"], 3),
    ],
)
def test_what_the_layout_refuses_megatron_refuses_too(
    changes: list[str], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training.arguments import core_transformer_config_from_args

    run = apply_overrides(recipe(TINY), ["layout.ep=1", *changes])
    with pytest.raises(InputError):
        megatron_arguments(run, world_size=world_size, device="cpu")
    monkeypatch.setattr(
        "mellum2_megatron.config.layout.Layout.validate", lambda *args, **kwargs: None
    )
    with pytest.raises((AssertionError, ValueError)):
        core_transformer_config_from_args(
            validated(run, monkeypatch, world_size=world_size, device="cpu")
        )


def test_checkpoint_folders_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    _, args = on_cpu([], monkeypatch)
    assert (args.save, args.load, args.pretrained_checkpoint) == (None, None, None)
    changes = [
        "checkpoint.output=/o",
        "checkpoint.load=/l",
        "checkpoint.save_interval=7",
    ]
    _, args = on_cpu(changes, monkeypatch)
    assert (args.save, args.load, args.pretrained_checkpoint) == ("/o", "/o", "/l")
    assert args.save_interval == 7
    assert args.save_retain_interval is None, "saving.remove_old does it"
    assert args.dist_ckpt_optim_fully_reshardable
    _, args = on_cpu(["checkpoint.any_layout=false"], monkeypatch)
    assert not args.dist_ckpt_optim_fully_reshardable
    assert not args.distrib_optim_fully_reshardable_mem_efficient
    _, args = on_cpu(["checkpoint.gather_on_one_rank=true"], monkeypatch)
    assert args.distrib_optim_fully_reshardable_mem_efficient
    assert args.use_gloo_process_groups


@pytest.mark.parametrize(("ep", "group"), [(1, "dp"), (2, "ep_dp"), (4, "dp")])
def test_checkpoint_reading_and_planning_arrive(
    ep: int, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, args = on_cpu([f"layout.ep={ep}"], monkeypatch, world_size=4)
    assert args.ckpt_fully_parallel_load
    assert args.ckpt_fully_parallel_load_process_group == group
    assert args.ckpt_fully_parallel_load_exchange_algo == "broadcast"
    assert args.ckpt_assume_constant_structure
    _, args = on_cpu(
        ["checkpoint.parallel_load=false", "checkpoint.reuse_plans=false"], monkeypatch
    )
    assert not args.ckpt_fully_parallel_load
    assert not args.ckpt_assume_constant_structure


def test_fault_settings_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    _, args = on_cpu(["timeout_minutes=2.5"], monkeypatch)
    assert args.distributed_timeout_minutes == 61, "after our own watch over the set-up"
    assert args.distributed_timeout_seconds_after_init == 210, "after our own watch"
    _, args = on_cpu(["setup_timeout_minutes=1.5", "timeout_minutes=2.5"], monkeypatch)
    assert args.distributed_timeout_minutes == 4, "the first step is one too"
    assert args.rerun_mode == "disabled"
    assert args.check_for_nan_in_loss_and_grad


def test_data_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.utils.common_utils import get_blend_and_blend_per_split

    _, args = on_cpu([], monkeypatch)
    assert get_blend_and_blend_per_split(args) == (
        None,
        [
            (["data/quickstart/train_document"], None),
            (["data/quickstart/valid_document"], None),
            None,
        ],
    )
    _, args = on_cpu(
        ["data.train=[[0.7,a],[0.3,b]]", "data.cache=/c", "data.workers=3", "seed=5"], monkeypatch
    )
    assert get_blend_and_blend_per_split(args)[1][0] == (["a", "b"], [0.7, 0.3])
    assert (args.data_cache_path, args.num_workers, args.seed) == ("/c", 3, 5)
    assert not args.create_attention_mask_in_dataloader


def test_every_word_is_megatrons_option_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = recipe(TINY)
    flags = [
        word
        for word in megatron_arguments(run, world_size=2, device="cpu")
        if word.startswith("--")
    ]
    assert len(flags) == len(set(flags))
    assert "--rampup-batch-size" not in flags
    assert "--tensorboard-dir" not in flags
    assert not any("yarn" in flag for flag in flags)


def test_cpu_flags_are_for_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    run = apply_overrides(recipe(TINY), ["backend=torch"])
    cpu = megatron_arguments(run, world_size=2, device="cpu")
    cuda = megatron_arguments(run, world_size=2, device="cuda")
    assert set(cpu) - set(cuda) == {
        "--distributed-backend",
        "gloo",
        "--use-cpu-initialization",
        "--no-bias-swiglu-fusion",
        "--no-bias-dropout-fusion",
    }
    with pytest.raises(InputError, match="backend=te"):
        megatron_arguments(dataclasses.replace(run, backend="te"), world_size=2, device="cpu")
