"""Model, losses, optimizer and schedule of a run, in Megatron's parser, config and scheduler."""

from __future__ import annotations

import pytest

from mellum2_megatron.config import apply_overrides
from mellum2_megatron.recipes import recipe
from tests import parameter_id
from tests.upstream.parsed import BIG, megatron_scheduler, on_cpu, validated

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
