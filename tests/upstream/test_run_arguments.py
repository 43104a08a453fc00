"""Layout, execution, checkpoints and data of a run, in Megatron's parser and validation."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from launchers.start import start_local
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import DETERMINISTIC_VARIABLES, Run, apply_overrides
from mellum2_megatron.planning.extra_arguments import extra_argument_problems
from mellum2_megatron.recipes import recipe, recipe_names
from mellum2_megatron.upstream import (
    environment,
    gpu_environment,
    kept_variables,
    megatron_arguments,
)
from mellum2_megatron.upstream.parser_check import require_parsed
from tests.upstream.parsed import BIG, TINY, on_cpu, stub_te, validated


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


@pytest.mark.slow
def test_words_are_read_by_megatron_before_any_rank_starts() -> None:
    def run_with(words: str) -> Run:
        return apply_overrides(recipe(TINY), [f"execution.extra_arguments=[{words}]"])

    require_parsed(run_with("--log-params-norm,--log-throughput"))
    with pytest.raises(InputError, match="unrecognized arguments: --no-such-flag"):
        require_parsed(run_with("--no-such-flag"))
    with pytest.raises(InputError, match="log-memory-interval: invalid int value: 'often'"):
        start_local(
            TINY,
            ["execution.extra_arguments=[--log-memory-interval,often]"],
            nproc=2,
            device="cpu",
            output=None,
            dry_run=True,
            verbose=False,
        )


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
