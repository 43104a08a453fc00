"""One rank's layer of latent attention: gradients with and without our sum over ranks."""

from __future__ import annotations

import torch


def gradients(sequence_parallel: bool, ours: bool) -> dict[str, torch.Tensor]:
    """Return the gradients of the projections that all heads share, whole on every rank.

    Args:
        sequence_parallel: divide the hidden states' tokens among the ranks.
        ours: with `_sum_rotated_key_gradients`; else with Megatron's method alone.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import (
        gather_from_tensor_model_parallel_region,
        model_parallel_cuda_manual_seed,
    )
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from mellum2_megatron.model.latent_attention import LatentSelfAttention
    from mellum2_megatron.model.layer_specs import layer_spec
    from mellum2_megatron.model.transformer_config import transformer_config
    from tests.layouts.test_layouts import LATENT
    from tests.layouts.worker import ARCHITECTURE, Case, initial_value

    ranks = torch.distributed.get_world_size()
    mpu.initialize_model_parallel(tensor_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    architecture = ARCHITECTURE.replace(**dict(LATENT))
    config = transformer_config(
        architecture,
        tensor_model_parallel_size=ranks,
        sequence_parallel=sequence_parallel and ranks > 1,
        use_cpu_initialization=True,
    )
    spec = layer_spec(architecture, "torch").submodules.self_attention
    attention = spec.module(config, spec.submodules, 4, **spec.params)
    if not ours:
        LatentSelfAttention._qkv_down_projection = MLASelfAttention._qkv_down_projection
    rank = mpu.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.copy_(initial_value(name, parameter, Case(tp=ranks), {"tp": rank}))
    shape, generator = (24, 2, architecture.hidden_size), torch.Generator().manual_seed(5)
    # Every token and channel counts differently in the loss.
    hidden, weight = (torch.randn(shape, generator=generator) for _ in range(2))
    if config.sequence_parallel:
        hidden, weight = (tensor.chunk(ranks)[rank] for tensor in (hidden, weight))
    output, _ = attention(hidden, None)
    (output * weight).sum().backward()
    return {
        name: gather_from_tensor_model_parallel_region(parameter.grad.T.contiguous()).T
        for name, parameter in attention.named_parameters()
        if name.endswith("down_proj.weight")
    }
