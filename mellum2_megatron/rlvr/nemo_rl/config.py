"""A run of reinforcement learning as a configuration of NeMo-RL, and what is lost on the way.

Two ways of NeMo-RL are rendered, because neither does all that the report describes (§5.2):

- ``sync``: groups of equal rewards are dropped from 1.5 times as many; all answers are of the
  policy that learns.
- ``async``: answers up to two updates old, on GPUs of their own; nothing is dropped.

The keys are those of docs/rlvr.md's table; NeMo-RL's own example gives all that is not named here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run
from mellum2_megatron.rlvr.nemo_rl import environment, tasks
from mellum2_megatron.rlvr.nemo_rl.declared import declared, require_declared, require_literal

Mode = Literal["sync", "async"]

EXAMPLE = "examples/configs/grpo_math_1B.yaml"
"""Configuration of NeMo-RL that gives all other keys."""
URL_FILE, TOKEN_FILE = "rewards.url", "rewards.token"
TRAIN_TASKS, VALID_TASKS = "tasks/train.jsonl", "tasks/valid.jsonl"
TEMPLATE_FILE = "chat_template.jinja"

PATIENCE_S, TIMEOUT_S = 3600.0, 900.0
"""Seconds over which the environment asks the rewards' service again, and for one request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a run of NeMo-RL finds its parts.

    Attributes:
        output: folder of configuration, tasks, logs and checkpoints.
        checkout: NeMo-RL's checkout.
        hf_path: Hugging Face folder of the model that learns.
        gpus_per_node: GPUs of a node.
        nodes: nodes that train.
        generation_nodes: nodes that write answers, with ``async``.
        validates: whether there are tasks of a validation.
        own_template: whether ``output`` has a chat template to use in place of the tokenizer's.
    """

    output: Path
    checkout: Path
    hf_path: Path
    gpus_per_node: int
    nodes: int
    generation_nodes: int = 0
    validates: bool = False
    own_template: bool = False


def render_config(run: Run, place: Place, mode: Mode) -> dict[str, Any]:
    """Return the configuration, each key of which NeMo-RL declares.

    Raises:
        InputError: the run is no such run, or has a setting that NeMo-RL cannot train with.
    """
    _require_possible(run, place, mode)
    config = {
        "defaults": str(place.checkout / EXAMPLE),
        "grpo": _grpo(run, place, mode),
        "loss_fn": _loss(run),
        "policy": _policy(run, place, mode),
        "data": _data(run, place),
        "env": {"_override_": True, environment.NAME: environment_settings(run, place, mode)},
        "logger": _logger(run, place),
        "checkpointing": {
            "enabled": True,
            "checkpoint_dir": str(place.output / "checkpoints"),
            "metric_name": "val:accuracy" if place.validates else None,
            "higher_is_better": True,
            "save_period": run.checkpoint.save_interval,
            "keep_top_k": run.checkpoint.keep_last,
        },
        "cluster": {
            "gpus_per_node": place.gpus_per_node,
            "num_nodes": place.nodes + (place.generation_nodes if mode == "async" else 0),
        },
    }
    require_declared(config, declared(place.checkout))
    require_literal(config)
    return config


def environment_settings(run: Run, place: Place, mode: Mode) -> dict[str, Any]:
    """Return the section of our environment."""
    objective = run.rl.objective
    return {
        "url_file": str(place.output / URL_FILE),
        "token_file": str(place.output / TOKEN_FILE),
        "tokenizer_file": str(place.hf_path / "tokenizer.json"),
        "timeout_s": TIMEOUT_S,
        "patience_s": PATIENCE_S,
        "penalties": {
            "max_tokens": objective.max_tokens,
            # With `sync` NeMo-RL takes this one off itself, after the groups are judged.
            "overlong_penalty": objective.overlong_penalty if mode == "async" else 0.0,
            "overlong_tokens": objective.overlong_tokens,
            "concision_penalty": objective.concision_penalty,
            "concision_free_tokens": objective.concision_free_tokens,
        },
    }


def _grpo(run: Run, place: Place, mode: Mode) -> dict[str, Any]:
    objective, shaped = run.rl.objective, run.rl.objective.overlong_penalty > 0
    sync = mode == "sync"
    return {
        "num_prompts_per_step": objective.prompts,
        "num_generations_per_prompt": objective.group_size,
        "max_num_steps": run.schedule.train_steps,
        "max_num_epochs": 1_000_000,  # the steps end the training
        "max_rollout_turns": 1,
        "normalize_rewards": False,
        "use_leave_one_out_baseline": True,
        "adv_estimator": {
            "name": "grpo",
            "normalize_rewards": False,
            "use_leave_one_out_baseline": True,
        },
        "skip_reference_policy_logprobs_calculation": True,
        "overlong_filtering": False,
        "use_dynamic_sampling": sync,
        "batch_multiplier": objective.oversampling if sync else 1.0,
        "dynamic_sampling_max_gen_batches": run.rl.rounds,
        "reward_shaping": {
            "enabled": sync and shaped,
            "overlong_buffer_length": objective.overlong_tokens,
            "overlong_buffer_penalty": objective.overlong_penalty,
            "max_response_length": objective.max_tokens,
        },
        "reward_scaling": {"enabled": False},
        "async_grpo": {
            "enabled": not sync,
            "max_trajectory_age_steps": objective.max_age,
            "in_flight_weight_updates": False,
        },
        "val_period": run.logging.eval_interval if place.validates else 0,
        "val_at_start": place.validates,
        "val_at_end": place.validates,
        "val_num_generations_per_prompt": max(1, run.rl.eval_answers),
        "seed": run.seed,
    }


def _loss(run: Run) -> dict[str, Any]:
    objective = run.rl.objective
    return {
        "reference_policy_kl_penalty": 0.0,
        "ratio_clip_min": objective.clip_low,
        "ratio_clip_max": objective.clip_high,
        "ratio_clip_c": None,
        "token_level_loss": True,
        "sequence_level_importance_ratios": False,
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "icepop",
        "truncated_importance_sampling_ratio": objective.band_high,
        "truncated_importance_sampling_ratio_min": objective.band_low,
        "use_on_policy_kl_approximation": False,
        "force_on_policy_ratio": False,
    }


def _policy(run: Run, place: Place, mode: Mode) -> dict[str, Any]:
    objective, layout, length = run.rl.objective, run.layout, run.data.sequence_length
    tokenizer: dict[str, Any] = {"name": str(place.hf_path)}
    if place.own_template:
        tokenizer["chat_template"] = str(place.output / TEMPLATE_FILE)
    return {
        "model_name": str(place.hf_path),
        "tokenizer": tokenizer,
        "train_global_batch_size": objective.prompts * objective.group_size,
        "train_micro_batch_size": 1,
        "logprob_batch_size": 1,
        "logprob_chunk_size": run.loss.head_chunk,
        "max_total_sequence_length": length,
        # Context parallelism cuts each sequence into two chunks a rank.
        "make_sequence_length_divisible_by": layout.tp * (2 * layout.cp if layout.cp > 1 else 1),
        "precision": "bfloat16",
        "max_grad_norm": run.optimizer.clip_grad,
        "dtensor_cfg": {"enabled": False},
        "dynamic_batching": {"enabled": False},
        # Required with context parallelism.
        "sequence_packing": {
            "enabled": True,
            "train_mb_tokens": length,
            "logprob_mb_tokens": length,
            "algorithm": "modified_first_fit_decreasing",
        },
        "megatron_cfg": _megatron(run),
        "generation": _generation(run, place, mode),
    }


def _megatron(run: Run) -> dict[str, Any]:
    layout, optimizer, schedule = run.layout, run.optimizer, run.schedule
    batch = run.rl.objective.prompts * run.rl.objective.group_size
    dispatcher: dict[str, Any] = {"moe_token_dispatcher_type": layout.dispatcher}
    if layout.dispatcher == "flex":
        dispatcher["moe_enable_deepep"] = layout.dispatcher_backend == "deepep"
        dispatcher["moe_flex_dispatcher_backend"] = layout.dispatcher_backend
    return {
        "enabled": True,
        "empty_unused_memory_level": 1,
        "activation_checkpointing": True,  # ours: the memory of such a run is not measured
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sp,
        "pipeline_model_parallel_size": layout.pp,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "pipeline_dtype": "bfloat16",
        **dispatcher,
        "moe_per_layer_logging": False,
        "freeze_moe_router": run.rl.freeze_router,
        # Rotation differs from layer to layer; the fused kernel is for one kind.
        "apply_rope_fusion": False,
        "defer_fp32_logits": run.loss.head_chunk is not None,
        "mtp_num_layers": run.architecture.num_mtp_layers,
        "mtp_loss_scaling_factor": run.loss.mtp_factor,
        "mtp_use_repeated_layer": False,
        "mtp_detach_heads": run.rl.mtp_detach,
        "optimizer": {
            "optimizer": "adam",
            "lr": optimizer.lr,
            "min_lr": optimizer.min_lr,
            "weight_decay": optimizer.weight_decay,
            "bf16": True,
            "fp16": False,
            "params_dtype": "float32",
            "adam_beta1": optimizer.adam_beta1,
            "adam_beta2": optimizer.adam_beta2,
            "adam_eps": optimizer.adam_eps,
            "use_distributed_optimizer": True,
            "use_precision_aware_optimizer": True,
            "clip_grad": optimizer.clip_grad,
        },
        "scheduler": {
            "start_weight_decay": optimizer.weight_decay,
            "end_weight_decay": optimizer.weight_decay,
            "weight_decay_incr_style": "constant",
            "lr_decay_style": schedule.style,
            "lr_decay_iters": schedule.train_steps,
            "lr_warmup_iters": schedule.warmup_samples // batch,
            "lr_warmup_init": 0.0,
        },
    }


def _generation(run: Run, place: Place, mode: Mode) -> dict[str, Any]:
    length = run.data.sequence_length
    resources: dict[str, int | None] = {"gpus_per_node": None, "num_nodes": None}
    if mode == "async":
        resources = {"gpus_per_node": place.gpus_per_node, "num_nodes": place.generation_nodes}
    return {
        "backend": "vllm",
        "max_new_tokens": run.rl.objective.max_tokens,
        # All of the model's own distribution, see `config.Rl`.
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": None,
        "stop_token_ids": None,
        "stop_strings": None,
        "vllm_cfg": {
            "async_engine": mode == "async",
            "precision": "bfloat16",
            "kv_cache_dtype": "auto",
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "expert_parallel_size": 1,
            "gpu_memory_utilization": 0.6,
            "max_model_len": length,
            "enforce_eager": False,
        },
        "colocated": {"enabled": mode == "sync", "resources": resources},
    }


def _data(run: Run, place: Place) -> dict[str, Any]:
    def data_set(file: str) -> dict[str, Any]:
        return {
            "dataset_name": tasks.CLASS,
            "data_path": str(place.output / file),
            "env_name": environment.NAME,
        }

    return {
        # The loader looks for this mark in the sections of the top alone.
        "_override_": True,
        "max_input_seq_length": run.data.sequence_length - run.rl.objective.max_tokens,
        "shuffle": True,
        "num_workers": 1,
        "use_multiple_dataloader": False,
        "default": None,
        "train": data_set(TRAIN_TASKS),
        "validation": data_set(VALID_TASKS) if place.validates else None,
    }


def _logger(run: Run, place: Place) -> dict[str, Any]:
    project = run.logging.wandb_project
    return {
        "log_dir": str(place.output / "logs"),
        "wandb_enabled": project is not None,
        "tensorboard_enabled": run.logging.tensorboard,
        "mlflow_enabled": False,
        "swanlab_enabled": False,
        "monitor_gpus": True,
        "num_val_samples_to_print": 0,
        "wandb": {"project": project or "mellum2", "name": run.name},
    }


def _require_possible(run: Run, place: Place, mode: Mode) -> None:
    """Refuse runs and machines that NeMo-RL cannot train with.

    Raises:
        InputError: see above.
    """
    layout, world = run.layout, place.nodes * place.gpus_per_node
    ways = layout.tp * layout.pp * layout.cp
    for holds, value, rule, fix in (
        (
            run.data.feed == "rollouts",
            f"{run.name}: data.feed={run.data.feed}",
            "NeMo-RL is rendered for reinforcement learning",
            "name an rlvr recipe, such as mellum2_12b_rlvr_instruct",
        ),
        (
            run.optimizer.name == "adam",
            f"optimizer.name={run.optimizer.name}",
            "NeMo-RL trains with Adam (policy.megatron_cfg.optimizer)",
            "use optimizer.name=adam",
        ),
        (
            run.schedule.style == "cosine",
            f"schedule.style={run.schedule.style}",
            "Megatron's scheduler, which NeMo-RL hands the word to, knows no such curve",
            "use schedule.style=cosine",
        ),
        (
            mode == "sync" or run.rl.objective.max_age > 0,
            "--mode async with rl.objective.max_age=0",
            "answers that are written while the model learns are 1 update old or more",
            "use --mode sync, or rl.objective.max_age=2",
        ),
        (
            layout.vpp == 1,
            f"layout.vpp={layout.vpp}",
            "NeMo-RL declares no key for virtual pipeline stages",
            "use layout.vpp=1",
        ),
        (
            place.gpus_per_node > 0,
            "a profile without gpus_per_node",
            "NeMo-RL needs GPUs",
            "set gpus_per_node in the profile",
        ),
        (
            world > 0 and world % ways == 0 and (layout.dp is None or layout.dp * ways == world),
            f"{place.nodes} node(s) of {place.gpus_per_node} GPUs",
            f"the layout has {ways} ranks for each of {layout.dp or 'any number of'} "
            "data-parallel parts",
            f"use {ways * (layout.dp or 1) / max(1, place.gpus_per_node):g} nodes, or set "
            "layout.dp=null",
        ),
        (
            mode == "sync" or place.generation_nodes > 0,
            "--mode async without generation nodes",
            "asynchronous answers are written on nodes of their own",
            "give --generation-nodes",
        ),
    ):
        if not holds:
            raise InputError(value, rule=rule, fix=fix)
