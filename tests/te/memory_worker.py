"""What Transformer Engine's modules keep, without a GPU: its autograd functions, no kernels.

Its Python decides what is saved, in which layout and which number format; kernels only fill
tensors. Here they return empty ones of the right size. The process prints the bytes as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformer_engine.pytorch  # before megatron, which looks for it

from tests.te.worker import activate_beside_transformer_engine

SEQUENCES, LENGTH = 2, 32
TOKENS = SEQUENCES * LENGTH


def replace_kernels() -> None:
    """Put functions in the place of kernels that a forward pass calls."""
    import transformer_engine_torch as kernels
    from megatron.core.extensions import transformer_engine as extensions
    from transformer_engine.pytorch import permutation, quantization
    from transformer_engine.pytorch.attention import rope
    from transformer_engine.pytorch.attention.dot_product_attention import (
        backends,
        dot_product_attention,
    )
    from transformer_engine.pytorch.module import grouped_linear, layernorm_linear, linear
    from transformer_engine.pytorch.ops.basic import rmsnorm
    from transformer_engine.pytorch.tensor.float8_tensor import (
        Float8CurrentScalingQuantizer,
        Float8Tensor,
    )
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    for module in (quantization, transformer_engine.pytorch.utils, linear, layernorm_linear):
        if hasattr(module, "get_device_compute_capability"):
            module.get_device_compute_capability = lambda: (9, 0)

    def quantize(self: Any, tensor: torch.Tensor, **_: Any) -> Any:
        size = (tensor.shape[-1], tensor.numel() // tensor.shape[-1])
        common = {
            "data": torch.empty(tensor.shape, dtype=torch.uint8) if self.rowwise_usage else None,
            "data_transpose": (
                torch.empty(size, dtype=torch.uint8) if self.columnwise_usage else None
            ),
            "fp8_scale_inv": torch.empty(1),
            "fp8_dtype": self.dtype,
            "quantizer": self,
        }
        if self.internal:
            return Float8TensorStorage(**common, fake_dtype=tensor.dtype)
        return Float8Tensor(**common, shape=tensor.shape, dtype=tensor.dtype, device=tensor.device)

    Float8CurrentScalingQuantizer.quantize_impl = quantize

    def norm(given: torch.Tensor, *rest: Any) -> Any:
        quantizer = next((one for one in rest if hasattr(one, "make_empty")), None)
        normed = torch.empty_like(given)
        if quantizer is not None:
            normed = quantize(quantizer, normed)
        return normed, None, torch.empty(given.numel() // given.size(-1))

    def norm_of_layer(given: torch.Tensor, out: Any, weight: Any, *rest: Any) -> Any:
        return norm(given, *rest)

    rmsnorm.rmsnorm_fwd = norm
    layernorm_linear.apply_normalization = norm_of_layer

    def product(weight: Any, given: Any, out_dtype: Any = None, *_: Any, **__: Any) -> Any:
        size = (*given.shape[:-1], weight.shape[0])
        made = torch.empty(size, dtype=out_dtype if out_dtype == torch.float32 else torch.bfloat16)
        return made, None, None, None

    linear.general_gemm = layernorm_linear.general_gemm = product
    extensions.general_gemm = product  # of the router
    grouped_linear.general_grouped_gemm = lambda *_, **__: None

    def split(given: torch.Tensor, sizes: Any, quantizers: Any, *_: Any, **options: Any) -> Any:
        parts = torch.split(given, sizes)
        if options["with_quantized_output"]:
            parts = tuple(quantize(one, part) for one, part in zip(quantizers, parts, strict=True))
        return list(parts), None

    grouped_linear._split_quantization._split_quantize = split

    def rotate(given: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty_like(given, memory_format=torch.contiguous_format)

    kernels.fused_rope_forward = rotate
    rope.tex.fused_rope_forward = rotate

    def attend(*given: Any, **_: Any) -> Any:
        tensors = [one for one in given if torch.is_tensor(one) and one.dtype == torch.bfloat16]
        query = tensors[0]
        sums = torch.empty(SEQUENCES, query.size(-2), LENGTH, 1)
        return torch.empty(query.shape, dtype=query.dtype), [sums, torch.empty(2)]

    backends.fused_attn_fwd = attend
    fused = kernels.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    dot_product_attention.dpa_utils.get_attention_backend = lambda *_: (
        False,
        None,
        True,
        fused,
        False,
        [False, True, False],
    )

    def choose(logits: torch.Tensor, chosen: int, *_: Any, **__: Any) -> Any:
        # Each expert gets as many tokens, a multiple of what FP8 products need.
        places = torch.arange(len(logits))[:, None] + torch.arange(chosen)
        routed = torch.zeros_like(logits, dtype=torch.bool)
        routed.scatter_(1, places % logits.size(1), True)
        return torch.zeros_like(logits), routed, torch.empty_like(logits)

    def score(logits: torch.Tensor, topk: int, **_: Any) -> Any:
        return choose(logits, topk)

    kernels.fused_multi_row_padding = kernels.fused_multi_row_unpadding = lambda *_: None
    kernels.fused_topk_with_score_function_fwd = choose
    kernels.fused_score_for_moe_aux_loss_fwd = score
    kernels.fused_moe_aux_loss_fwd = lambda **_: (torch.zeros(()), torch.zeros(()))
    replace_permutation(permutation)


def replace_permutation(permutation: Any) -> None:
    """Put functions in the place of the kernels that exchange tokens."""
    torch.Tensor.is_cuda = property(lambda _: True)  # it asks where its tensors are
    triton = permutation.triton_permutation

    def places(routed: torch.Tensor, tokens: int, experts: int, *_: Any) -> torch.Tensor:
        return torch.zeros(tokens, 2 * experts + 1, dtype=torch.int32)

    def permute(given: torch.Tensor, _: Any, probs: Any, *rest: Any) -> Any:
        rows = rest[4]
        weights = None if probs is None else torch.empty(rows, dtype=probs.dtype)
        return torch.empty(rows, given.size(-1), dtype=given.dtype), None, weights

    def unpermute(given: torch.Tensor, *rest: Any) -> Any:
        return torch.empty(rest[4], given.size(-1), dtype=given.dtype), None

    def sort(given: torch.Tensor, _: Any, probs: Any, *rest: Any, **__: Any) -> Any:
        return torch.empty_like(given), None if probs is None else torch.empty_like(probs)

    triton.make_row_id_map = places
    triton.permute_with_mask_map = permute
    triton.unpermute_with_mask_map = unpermute
    triton.make_chunk_sort_map = lambda _, __, tokens, ___: torch.zeros(tokens, dtype=torch.int32)
    triton.sort_chunks_by_map = sort


def kept(compute: str, recompute: str) -> dict[str, int]:
    """Return the bytes that a forward pass of a small te model saves, by module."""
    from megatron.core.transformer.module import Float16Module

    from mellum2_megatron.config import Loss
    from mellum2_megatron.model.provider import model_provider
    from mellum2_megatron.model.transformer_config import transformer_config
    from tests.layouts.worker import ARCHITECTURE
    from tests.live_memory import saved_by_module

    again = [word for word in recompute.split(",") if word]
    fields: dict[str, Any] = {
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 1e-3,
        "moe_z_loss_coeff": 1e-3,
        "moe_grouped_gemm": True,
        "moe_router_fusion": True,
        "moe_permute_fusion": True,
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
    }
    if compute == "fp8":
        fields |= {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    if again:
        fields |= {"recompute_granularity": "selective", "recompute_modules": again}
    config = transformer_config(
        ARCHITECTURE,
        use_cpu_initialization=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        **fields,
    )
    plain = model_provider(ARCHITECTURE, "te", loss=Loss(head_chunk=None))(config=config)
    model = Float16Module(config, plain).train()
    tokens = torch.randint(0, ARCHITECTURE.vocab_size, (SEQUENCES, LENGTH + 1))
    with saved_by_module(model.module) as found:
        model(
            tokens[:, :-1],
            torch.arange(LENGTH).expand(SEQUENCES, -1),
            None,
            labels=tokens[:, 1:].contiguous(),
            loss_mask=torch.ones(SEQUENCES, LENGTH),
        )
    return found


def main() -> None:
    activate_beside_transformer_engine()
    from mellum2_megatron.cpu import init_single_process
    from mellum2_megatron.upstream import patching
    from mellum2_megatron.upstream.patches import PATCHES

    init_single_process()
    patching.install(PATCHES)
    replace_kernels()
    found = {}
    for case in sys.argv[1:]:
        compute, _, recompute = case.partition(" ")
        found[case] = kept(compute, recompute)
    sys.stdout.write("RESULT " + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
