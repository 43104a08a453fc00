"""Functions of the te backend's tests, for a process of its own with Transformer Engine and no GPU.

Its modules can be built without a driver, but not run. The process prints a function's result as
JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import torch
import transformer_engine.pytorch  # before megatron, which looks for it when it is imported

from mellum2_megatron import upstream
from mellum2_megatron.cpu import activation, compiling, device
from mellum2_megatron.cpu.patches import PATCHES
from mellum2_megatron.upstream import patching


def activate_beside_transformer_engine() -> None:
    """Do what `cpu.activate` does, except hiding Transformer Engine."""
    upstream.activate()
    upstream.quiet_upstream()
    device.install()
    compiling.install()
    patching.install(PATCHES)
    # Its modules refuse to be built otherwise (transformer_engine/pytorch/module/base.py:896,
    # 2.20.2).
    torch.cuda.is_available = lambda: True
    activation._active = True


def deterministic_documents(scores: str) -> list[dict[str, bool]]:
    """Return Transformer Engine's choice of kernel for deterministic attention on Hopper, without
    FlashAttention: for a document with just fewer scores of 32 heads, and for one with just more.
    """
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    length = int((int(scores) / 32) ** 0.5)
    kernel = utils.FusedAttnBackend["F16_arbitrary_seqlen"]
    # Three questions to the driver.
    utils.get_device_compute_capability = lambda: (9, 0)
    utils.get_cudnn_version = lambda: (9, 26, 0)
    utils._get_fused_attn_backend = lambda **_: (int(kernel), "")
    torch.cuda.current_device = lambda: 0
    found = []
    for tokens in (length - 64, length + 64):
        asked = utils.AttentionParams(
            qkv_dtype=torch.bfloat16,
            qkv_layout="thd_thd_thd",
            batch_size=1,
            num_heads=32,
            num_gqa_groups=4,
            max_seqlen_q=tokens,
            max_seqlen_kv=tokens,
            head_dim_qk=128,
            head_dim_v=128,
            attn_mask_type="padding_causal",
            window_size=(-1, 0),
            core_attention_bias_requires_grad=False,
            deterministic=True,
        )
        chosen = utils.get_attention_backend(asked)
        found.append({"fused": bool(chosen[2]), "unfused": bool(chosen[4])})
    return found


def sharded_tensors(model: Any) -> dict[str, list[int]]:
    """Return the global shape of each checkpoint key."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    shapes: dict[str, list[int]] = {}

    def walk(value: Any) -> None:
        if isinstance(value, ShardedTensor):
            shapes[value.key] = list(value.global_shape)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)

    state = model.sharded_state_dict()
    apply_factories(state)
    walk(state)
    return shapes


def latent_models() -> dict[str, Any]:
    """Return checkpoint keys of a model with latent attention by backend, and its windows."""
    from mellum2_megatron.architecture import PRESETS, LatentAttention
    from mellum2_megatron.model.provider import build_model

    widths = LatentAttention(
        kv_lora_rank=32, q_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64
    )
    architecture = PRESETS["mellum2-tiny"].replace(latent_attention=widths)
    te = build_model(
        architecture,
        backend="te",
        moe_grouped_gemm=True,
        use_cpu_initialization=True,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    plain = build_model(architecture, backend="torch", use_cpu_initialization=True)
    return {
        "te": sharded_tensors(te),
        "torch": sharded_tensors(plain),
        "parameters": sum(parameter.numel() for parameter in te.parameters()),
        "expected": architecture.num_parameters(),
        "windows": [
            list(layer.self_attention.core_attention.window_size or [])
            for layer in te.decoder.layers
        ],
    }


def tiny_models() -> dict[str, Any]:
    """Return checkpoint keys of the tiny model with both backends, and windows and scales of te."""
    from mellum2_megatron.architecture import PRESETS, RopeParameters
    from mellum2_megatron.model.initial_weights import draw_by_name
    from mellum2_megatron.model.provider import build_model
    from mellum2_megatron.model.router import Mellum2Router

    yarn = RopeParameters(
        rope_type="yarn", rope_theta=500_000.0, factor=16.0, original_max_position_embeddings=32
    )
    architecture = PRESETS["mellum2-tiny"].replace(rope_full_attention=yarn)
    te = build_model(
        architecture,
        backend="te",
        moe_grouped_gemm=True,
        use_cpu_initialization=True,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    plain = build_model(architecture, backend="torch", use_cpu_initialization=True)
    attentions = [layer.self_attention for layer in te.decoder.layers]
    attentions.append(te.mtp.layers[0].mtp_model_layer.self_attention)
    for model in (te, plain):
        draw_by_name(model, model.config, 3)
    wanted = dict(plain.named_parameters())
    drawn = {
        re.sub(
            r"experts\.(linear_fc\d)\.weight(\d+)", r"experts.local_experts.\2.\1.weight", name
        ): p
        for name, p in te.named_parameters()
        if p.dim() > 1
    }
    return {
        "drawn_alike": sum(torch.equal(p, wanted[name].bfloat16()) for name, p in drawn.items()),
        "matrices": sum(p.dim() > 1 for p in wanted.values()),
        "te": sharded_tensors(te),
        "torch": sharded_tensors(plain),
        "parameters": {
            "te": sum(p.numel() for p in te.parameters()),
            "torch": sum(p.numel() for p in plain.parameters()),
        },
        "windows": [list(attention.core_attention.window_size or ()) for attention in attentions],
        "scales": [attention.core_attention.softmax_scale for attention in attentions],
        "modules": sorted({type(module).__name__ for module in te.modules()}),
        "routers_are_ours": all(
            isinstance(layer.mlp.router, Mellum2Router) for layer in te.decoder.layers
        ),
    }


def projection_contexts() -> list[dict[str, bool]]:
    """Return the FP8 state of the MTP layer's linears, without and with `bf16_mtp_projection`."""
    from transformer_engine.pytorch import quantization

    quantization.get_device_compute_capability = lambda: (9, 0)
    return [_fp8_seen(choice) for choice in (False, True)]


def _fp8_seen(choice: bool) -> dict[str, bool]:
    """Run Megatron's forward functions in its FP8 context, without Transformer Engine's kernels."""
    from megatron.core import fp8_utils
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from mellum2_megatron.architecture import PRESETS
    from mellum2_megatron.config import Precision
    from mellum2_megatron.model.provider import model_provider
    from mellum2_megatron.model.transformer_config import transformer_config

    architecture = PRESETS["mellum2-tiny"]
    config = transformer_config(
        architecture,
        moe_grouped_gemm=True,
        use_cpu_initialization=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        fp8="hybrid",
        fp8_recipe="tensorwise",
    )
    provide = model_provider(
        architecture, "te", precision=Precision(compute="fp8", bf16_mtp_projection=choice)
    )
    layer = provide(config=config).train().mtp.layers[0]
    seen: dict[str, bool] = {}
    names = {module: name.rpartition(".")[2] for name, module in layer.named_modules()}

    def compute(module: Any, given: torch.Tensor, **_: Any) -> torch.Tensor:
        seen[names[module]] = FP8GlobalStateManager.is_fp8_enabled()
        return given

    for kind in (transformer_engine.pytorch.Linear, transformer_engine.pytorch.LayerNormLinear):
        kind.forward = compute
    attention = layer.mtp_model_layer.self_attention
    with fp8_utils.get_fp8_context(config):
        for module in (layer.eh_proj, attention.linear_qkv, attention.linear_proj):
            module(torch.zeros(4, 1, 8))
    return seen


def recipe_model(name: str, stage: str) -> dict[str, Any]:
    """Validate a recipe with Megatron at its world size, and build one rank on the meta device.

    The process group is torch's fake one: it has the size of the world and moves no data.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from mellum2_megatron.recipes import recipe
    from mellum2_megatron.upstream import environment, megatron_arguments

    run = recipe(name)
    world = run.layout.world_size
    assert world is not None
    rank = int(stage) * world // run.layout.pp
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": "0"} | environment(
        run
    )
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.training.arguments import (
        core_transformer_config_from_args,
        parse_args,
        validate_args,
    )

    sys.argv = ["pretrain", *megatron_arguments(run, world_size=world, device="cuda")]
    args = parse_args()
    validate_args(args)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        # They would be real groups, and wait for ranks that do not exist.
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = core_transformer_config_from_args(args)
    config.init_model_with_meta_device = True
    config.perform_initialization = False
    from mellum2_megatron.model.provider import build_model
    from mellum2_megatron.muon import even_shares
    from mellum2_megatron.planning.memory import memory_by_stage

    even_shares.activate(run.optimizer)
    with torch.device("meta"):
        model = build_model(
            run.architecture,
            backend="te",
            config=config,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            parallel_output=True,
        )
    estimate = memory_by_stage(run, world_size=world)[int(stage)]
    return {
        "world": world,
        "parameters": sum(p.numel() for p in model.parameters()),
        "devices": sorted({p.device.type for p in model.parameters()}),
        "expected": estimate.parameters,
        "padding": padding_bytes(model, args),
        "expected_padding": estimate.padding,
        "layer_wise": args.use_layer_wise_distributed_optimizer,
        "fp8": config.fp8,
        "fp8_recipe": str(config.fp8_recipe),
        "router_fusion": config.moe_router_fusion,
        "grouped": config.moe_grouped_gemm,
        "modules": sorted({type(module).__name__ for module in model.modules()}),
    }


def padding_bytes(model: torch.nn.Module, args: Any) -> int:
    """Return the padding of Megatron's buffers in bytes, for BF16 weights and FP32 gradients.

    The layout is computed as in `get_model` (megatron/training/training.py:1838-1893, 0.19.2); no
    buffer is made.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.layer_wise_optimizer import (
        LayerWiseDistributedOptimizer,
        tag_params_for_buffer_routing,
    )
    from megatron.training.training import resolve_ddp_bucket_size

    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32
    )
    parameters = list(model.parameters())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    bucket = resolve_ddp_bucket_size(config, group, args.overlap_grad_reduce, None)
    tag_params_for_buffer_routing([model])
    layout = LayerWiseDistributedOptimizer.compute_full_param_layout(
        parameters,
        None if parallel_state.get_pipeline_model_parallel_rank() else bucket,
        group.size(),
        config,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_group().size(),
    )
    elements = sum(buffer.bucket_indices[-1][1] for buffer in layout.layouts.values())
    return (2 + 4) * (elements - sum(parameter.numel() for parameter in parameters))


def main() -> None:
    activate_beside_transformer_engine()
    if sys.argv[1] in ("tiny_models", "latent_models", "projection_contexts"):
        from mellum2_megatron.cpu import init_single_process

        init_single_process()
    sys.stdout.write("RESULT " + json.dumps(globals()[sys.argv[1]](*sys.argv[2:])) + "\n")


if __name__ == "__main__":
    main()
