"""Activations of a rank, tensor by tensor: what each module keeps, and what exists on top.

No torch: instant on a login node. Each function lists the tensors that modules keep for the
backward pass. tests/planning/test_activations.py compares the lists with what autograd saves in the
real modules: all of the torch backend on a CPU, and Transformer Engine's own autograd functions
with their kernels replaced. What a GPU reports was never measured.

Sizes are bytes for each token of a rank: a micro-batch's tokens divided by context and sequence
parallelism. Tensor parallelism gathers tokens and divides channels, which leaves that size alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mellum2_megatron.architecture import LayerType, Mellum2Architecture, MlpType
from mellum2_megatron.config import Backend, Execution, Layout, Run

BF16, FP32, INT32, INT64 = 2, 4, 4, 8


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that a module keeps for the backward pass.

    Attributes:
        name: its content.
        size: bytes for each token of the rank.
        freed: words of ``execution`` of which one is enough to free it, such as
            ``recompute.moe_act``; default none.
        load: true if it grows with the tokens that the rank's experts get; default false.
    """

    name: str
    size: float
    freed: tuple[str, ...] = ()
    load: bool = False


def kept_size(tensors: Iterable[Kept], execution: Execution, *, load: bool | None = None) -> float:
    """Return the bytes a token of tensors that ``execution`` does not free.

    Args:
        tensors: tensors of one module or layer.
        execution: what is computed again and what is offloaded.
        load: count only the tensors that grow with the experts' load, or only the others; None
            (default): all.
    """
    return sum(
        tensor.size
        for tensor in tensors
        if not _is_freed(tensor, execution) and load in (None, tensor.load)
    )


def _is_freed(tensor: Kept, execution: Execution) -> bool:
    words = {f"recompute.{name}" for name in execution.recompute}
    words |= {f"offload.{name}" for name in execution.offload}
    return not words.isdisjoint(tensor.freed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Modules:
    """Modules of a layer, as far as they decide what is kept.

    Attributes:
        backend: "te", or "torch" as it computes on a CPU. On a GPU plain torch keeps less: its norm
            is one kernel there, and its attention does not widen.
        fp8: true if the layer's products take FP8 inputs. Only te has them.
        balanced: true if a load-balancing loss reads the router's scores.
        z_loss: true if a loss reads the router's logits.
        sequences: sequences of a micro-batch, which share angles and masks.
    """

    backend: Backend
    fp8: bool
    balanced: bool
    z_loss: bool
    sequences: int

    @classmethod
    def of(cls, run: Run, backend: Backend, *, fp8: bool) -> Modules:
        """Return the modules of a run's layer."""
        loss = run.loss
        return cls(
            backend=backend,
            fp8=fp8,
            balanced=loss.aux_loss_type != "none" and loss.aux_loss_coef > 0,
            z_loss=loss.z_loss_coef > 0,
            sequences=run.schedule.micro_batch_size,
        )

    @property
    def product_input(self) -> int:
        """Bytes of an element of a product's kept input."""
        # Transformer Engine keeps the FP8 copy that the weight's gradient needs, and drops both
        # its BF16 original and the copy of the forward product (module/linear.py:712,
        # module/grouped_linear.py:919, 2.20.2).
        return 1 if self.fp8 else BF16


def layer_tensors(
    architecture: Mellum2Architecture,
    layout: Layout,
    modules: Modules,
    mlp: MlpType,
    *,
    rows: float | None = None,
) -> list[Kept]:
    """Return the tensors that one transformer layer keeps.

    Args:
        architecture: the model.
        layout: the layout, for the degrees that change a token's share.
        modules: the layer's modules.
        mlp: "sparse" or "dense".
        rows: tokens that the rank's experts get for each token of the rank; None (default): an
            even load, one for each expert of a token.
    """
    tensors = [
        *attention_tensors(architecture, modules),
        # The output of the attention and the residual: what the second norm reads.
        *norm_tensors(
            "second norm", architecture.hidden_size, modules, freed=("offload.mlp_norm",)
        ),
    ]
    if mlp == "dense":
        return tensors + dense_tensors(architecture, modules)
    even = float(architecture.num_experts_per_tok)
    return [
        *tensors,
        *router_tensors(architecture, modules),
        *expert_tensors(architecture, layout, modules, rows=even if rows is None else rows),
        *shared_expert_tensors(architecture, modules),
    ]


def norm_tensors(
    name: str, width: int, modules: Modules, *, heads: int = 1, freed: tuple[str, ...] = ()
) -> list[Kept]:
    """Return the tensors that an RMSNorm keeps: its input, and the root mean square of each row.

    Args:
        name: name of the norm.
        width: elements of a token, all heads together.
        modules: the layer's modules.
        heads: rows of a token, each normalised by itself; default 1.
        freed: see `Kept`.
    """
    root = Kept(f"{name}: root mean square", FP32 * heads)
    if modules.backend == "te":
        return [Kept(f"{name}: input", BF16 * width, freed), root]
    # torch's norm on a CPU computes in float32 and keeps input and output in it.
    return [
        Kept(f"{name}: input in float32", FP32 * width),
        Kept(f"{name}: output in float32", FP32 * width),
        root,
    ]


def attention_tensors(architecture: Mellum2Architecture, modules: Modules) -> list[Kept]:
    """Return the tensors that a layer keeps from its input to the output projection's."""
    a = architecture
    if a.latent_attention is not None:
        return [_latent_attention(a, modules)]
    heads, groups, width = a.num_attention_heads, a.num_key_value_heads, a.head_dim
    queries, keys = heads * width, groups * width
    te = modules.backend == "te"
    attended = ("offload.core_attn",)
    tensors = [
        *norm_tensors("first norm", a.hidden_size, modules),
        Kept(
            "input of the projection to Q, K and V",
            # One autograd function of te: norm and projection. It quantizes the norm's output.
            modules.product_input * a.hidden_size,
            # A norm inside of the projection is not computed again.
            ("offload.qkv_linear",) if te else ("recompute.layernorm",),
        ),
        *norm_tensors("norm of queries", queries, modules, heads=heads),
        *norm_tensors("norm of keys", keys, modules, heads=groups),
    ]
    if te:
        # FusedAttention's inputs, its output and the logarithm of each softmax's sum. Values are
        # copied, because they are a strided view (attention/dot_product_attention/utils.py,
        # `get_qkv_layout`, 2.20.2). Under FP8 the output projection keeps its BF16 input, which is
        # the same tensor (megatron/core/transformer/attention.py:443, 0.19.2).
        return [
            *tensors,
            Kept("rotated queries", BF16 * queries, attended),
            Kept("rotated keys", BF16 * keys, attended),
            Kept("values", BF16 * keys, attended),
            Kept("attention's output", BF16 * queries, ("offload.attn_proj",)),
            Kept("softmax sums", FP32 * heads),
        ]
    return [
        *tensors,
        Kept("cosines and sines of the rotations", 4 * BF16 * width / modules.sequences),
        # On a CPU the attention computes in float32 (model/core_attention.py).
        Kept("rotated queries in float32", FP32 * queries),
        Kept("rotated keys in float32", FP32 * keys),
        Kept("values in float32", FP32 * keys),
        Kept("attention's output in float32", FP32 * queries),
        Kept("softmax sums", FP32 * heads),
        Kept("input of the output projection", BF16 * queries),
    ]


def _latent_attention(a: Mellum2Architecture, modules: Modules) -> Kept:
    """Return what multi-head latent attention keeps, as one sum: rough, compared with no module."""
    latent, heads, (width, value) = a.latent_attention, a.num_attention_heads, a.head_widths
    assert latent is not None
    # Latents before and after their norms; every head has keys and values of its own.
    latents = (latent.q_lora_rank or 0) + latent.kv_lora_rank + latent.qk_rope_head_dim
    elements = 2 * a.hidden_size + 2 * latents + 2 * heads * (2 * width + value) + heads * value
    return Kept("latent attention", (BF16 if modules.backend == "te" else FP32) * elements)


def router_tensors(architecture: Mellum2Architecture, modules: Modules) -> list[Kept]:
    """Return the tensors that the router and the exchange of tokens keep."""
    experts, chosen = architecture.num_experts, architecture.num_experts_per_tok
    again = ("recompute.moe",)
    # The norm's output goes to the router, the exchange and a shared expert.
    tensors = [
        Kept("input of the router", BF16 * architecture.hidden_size, ("recompute.layernorm",))
    ]
    if modules.z_loss:
        tensors.append(Kept("router logits", FP32 * experts + FP32, again))
    if modules.backend == "te":
        return [
            *tensors,
            Kept("map and scores of the chosen experts", (1 + FP32) * experts, again),
            *([Kept("scores to balance", FP32 * experts, again)] if modules.balanced else []),
            # Row numbers by expert, twice, and their count (permutation.py, 2.20.2).
            Kept("places of the sent tokens", INT32 * (2 * experts + 1), again),
        ]
    balance = FP32 * experts + INT64 * chosen
    return [
        *tensors,
        Kept("indices of the chosen experts", INT64 * chosen, again),
        Kept("probabilities of the chosen experts", FP32 * chosen, again),
        *([Kept("scores to balance", balance, again)] if modules.balanced else []),
        # A sort of the whole map, of which the chosen ones are used.
        Kept("places of the sent tokens", INT64 * (experts + chosen), again),
    ]


def expert_tensors(
    architecture: Mellum2Architecture, layout: Layout, modules: Modules, *, rows: float
) -> list[Kept]:
    """Return the tensors that the experts keep; arguments as for `layer_tensors`."""
    hidden, inner = architecture.hidden_size, architecture.moe_intermediate_size
    again, act = "recompute.moe", "recompute.moe_act"
    # With its input offloaded, the first product keeps BF16 (megatron/core/transformer/moe/
    # experts.py:283, 0.19.2), which then is gone too.
    gate_and_up = Kept(
        "gate and up", rows * BF16 * 2 * inner, (again, "offload.moe_act"), load=True
    )
    # Expert-tensor ranks gather each other's tokens for a part of the channels.
    received = Kept(
        "input of the first product",
        rows * layout.etp * modules.product_input * hidden,
        (again, "offload.expert_fc1"),
        load=True,
    )
    weights = Kept("weights of the tokens", rows * layout.etp * FP32, (again,), load=True)
    product = Kept(
        "input of the second product", rows * modules.product_input * inner, (again, act), load=True
    )
    tensors = [received, gate_and_up, weights, product]
    if modules.backend == "te":
        tensors.append(
            # In the order of the ranks that sent them, and back in it.
            Kept(
                "places of the received tokens", 2 * rows * layout.etp * INT32, (again,), load=True
            )
        )
    else:
        # One operator for each step of the SwiGLU (megatron/core/transformer/mlp.py:329, 0.19.2).
        tensors += [
            Kept(name, rows * BF16 * inner, (again,), load=True)
            for name in ("SiLU of the gate", "shifted up", "product before its weight")
        ]
    return tensors


def shared_expert_tensors(architecture: Mellum2Architecture, modules: Modules) -> list[Kept]:
    """Return the tensors that the expert of all tokens keeps, if there is one.

    Its first product shares the router's input, under FP8 too (megatron/core/transformer/moe/
    shared_experts.py:156, 0.19.2).
    """
    inner = architecture.shared_expert_intermediate_size
    return _mlp_tensors("shared expert", inner, modules, ("recompute.moe",)) if inner else []


def dense_tensors(architecture: Mellum2Architecture, modules: Modules) -> list[Kept]:
    """Return the tensors that a dense MLP keeps, its norm's output included."""
    size = modules.product_input * architecture.hidden_size
    freed = () if modules.backend == "te" else ("recompute.layernorm",)
    return [
        Kept("input of the first product", size, freed),
        *_mlp_tensors("dense MLP", architecture.intermediate_size, modules, ()),
    ]


def _mlp_tensors(name: str, inner: int, modules: Modules, freed: tuple[str, ...]) -> list[Kept]:
    tensors = [
        Kept(f"{name}: gate and up", BF16 * 2 * inner, freed),
        Kept(f"{name}: input of the second product", modules.product_input * inner, freed),
    ]
    if modules.backend == "torch":
        tensors += [
            Kept(f"{name}: SiLU of the gate", BF16 * inner, freed),
            Kept(f"{name}: shifted up", BF16 * inner, freed),
        ]
    return tensors


def mtp_tensors(architecture: Mellum2Architecture, modules: Modules) -> list[Kept]:
    """Return the tensors that an MTP layer keeps around its transformer layer.

    Args:
        architecture: the model.
        modules: modules of the MTP layer; ``fp8`` says how its projection computes.
    """
    hidden = architecture.hidden_size
    return [
        *norm_tensors("norm of the embedding", hidden, modules),
        *norm_tensors("norm of the hidden state", hidden, modules),
        Kept("input of the MTP projection", modules.product_input * 2 * hidden),
        *norm_tensors("last norm of the MTP layer", hidden, modules),
    ]


def whole_head_tensors(architecture: Mellum2Architecture) -> list[Kept]:
    """Return the tensors that one output head keeps with all logits at once.

    The head is Megatron's own in both backends, and computes in BF16
    (megatron/core/tensor_parallel/cross_entropy.py, 0.19.2).
    """
    return [
        Kept("input of the head", BF16 * architecture.hidden_size),
        Kept("softmax in float32", FP32 * architecture.vocab_size),
        Kept("labels", 1 + INT64),
    ]


def chunked_head_size(architecture: Mellum2Architecture, layout: Layout, tokens: int) -> float:
    """Return the bytes that one head in chunks keeps: its gradients (model/chunked_head.py).

    Args:
        architecture: the model.
        layout: the layout.
        tokens: tokens of the rank.
    """
    # The hidden states of all tokens of the tensor-parallel group meet a part of the vocabulary.
    gathered, rows = tokens * layout.tp, architecture.vocab_size // layout.tp
    return BF16 * architecture.hidden_size * (gathered + rows) + FP32 * gathered


def head_transient(
    architecture: Mellum2Architecture, layout: Layout, tokens: int, chunk: int | None
) -> float:
    """Return the bytes that one head needs while it runs, beside those that it keeps.

    Args:
        architecture, layout, tokens: as for `chunked_head_size`.
        chunk: ``loss.head_chunk``.
    """
    gathered, rows = tokens * layout.tp, architecture.vocab_size // layout.tp
    if chunk is None:
        # Logits in BF16 beside the softmax, and as much again their gradient afterwards.
        return BF16 * gathered * rows
    # Logits of a chunk in BF16 and float32, then the softmax and its gradient.
    running = (BF16 + FP32) * min(chunk, gathered) * rows
    # A sum over chunks: the weight's gradient in float32 beside one chunk's part of it in BF16.
    # What is kept in the end is in BF16.
    summed = FP32 * rows * architecture.hidden_size if chunk < gathered else 0
    return running + summed


def layer_transient(
    architecture: Mellum2Architecture,
    layout: Layout,
    tensors: Sequence[Kept],
    execution: Execution,
    mlp: MlpType,
    *,
    rows: float,
) -> float:
    """Return the bytes a token that a layer needs on top of what it keeps, while it runs.

    The exchange holds three copies of the tokens at a time: as sent, as received and in the order
    of the experts. Backward the gradient of gate and up stands beside them. What is computed again
    or comes back from the machine's memory exists for one layer, and offloaded tensors of the next
    one are already on their way.

    Args:
        architecture, layout, mlp, rows: as for `layer_tensors`.
        tensors: the layer's tensors.
        execution: what is computed again and what is offloaded.
    """
    returned = sum(
        tensor.size
        * (2 if {f"offload.{name}" for name in execution.offload} & set(tensor.freed) else 1)
        for tensor in tensors
        if _is_freed(tensor, execution)
    )
    hidden = BF16 * architecture.hidden_size
    gathered = 0.0
    if layout.cp > 1:
        # Keys and values of all context-parallel ranks, and their gradients.
        keys = architecture.num_key_value_heads * architecture.head_dim
        gathered = 2 * layout.cp * BF16 * 2 * keys
    if mlp == "dense":
        inner = BF16 * 2 * architecture.intermediate_size
        return returned + max(3 * hidden + inner, gathered)
    inner = BF16 * 2 * architecture.moe_intermediate_size
    return returned + max(rows * (3 * layout.etp * hidden + inner), gathered)


def mask_size(run: Run, modules: Modules, kind: LayerType) -> float:
    """Return the bytes of the masks that one layer's attention keeps; te's kernels have none.

    The torch backend asks for blocks of queries, and widens the mask of each to float32
    (model/core_attention.py). Documents and context parallelism make smaller blocks; they are
    counted as one sequence on one rank.
    """
    if modules.backend == "te":
        return 0.0
    length, block = run.data.sequence_length // run.layout.cp, 2048
    window = run.architecture.sliding_window if kind == "sliding_attention" else None
    if window is not None:
        block = min(block, max(window, 64))
    size = 0
    for start in range(0, length, block):
        queries = min(block, length - start)
        keys = start + queries - max(0, start - window + 1 if window else 0)
        if queries != keys or (window is not None and window < keys):
            size += FP32 * queries * keys
    return size
