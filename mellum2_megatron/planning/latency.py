"""Analytic time of inference: a roofline of every operation of a forward pass.

An operation takes the longest of three times: its FLOPs at the machine's peak, its bytes at the
machine's bandwidth, and the shortest launch. Nothing overlaps and nothing is slowed down, so the
sum says which shape is faster, not how many milliseconds an engine takes. Weights, activations and
keys are BF16. Shapes come from `Mellum2Architecture.parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from mellum2_megatron.architecture import LayerType, Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import require_positive_int
from mellum2_megatron.planning.gpus import Machine

BF16 = 2
"""Bytes of a weight, an activation, a key or a value."""

MEMORY_SHARE = 0.9
"""Part of a GPU's memory for weights and keys: vLLM's default ``gpu_memory_utilization``."""

# Norms, rotary embedding, router's top-k, permutation of tokens, activation: kernels without a
# matrix. They move activations only, so they cost a launch or a pass over `[tokens, hidden]`.
_ELEMENTWISE = 6
"""Kernels without a matrix product in a layer; a count of ours."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One kernel of a forward pass.

    Attributes:
        name: what it computes.
        flops: multiplications and additions.
        bytes: weights, keys and activations that cross the memory bus.
    """

    name: str
    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """Return its time on ``machine``: the longest of arithmetic, memory and launch."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth, machine.launch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A request, and how requests meet.

    Attributes:
        prompt: tokens of the input, default 2,304 (report §2.1).
        output: generated tokens, default 256 (report §2.1).
        max_batch: most requests at a time in throughput mode, default 256; ours, because the report
            gives none.
    """

    prompt: int = 2304
    output: int = 256
    max_batch: int = 256

    def __post_init__(self) -> None:
        require_positive_int("--prompt", self.prompt)
        require_positive_int("--output", self.output)
        require_positive_int("--max-batch", self.max_batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Analytic times of a request, in seconds.

    Attributes:
        first_token: from the request to its first token, alone on the machine.
        sync: whole request alone on the machine (synchronous mode).
        throughput: machine time of one request when `batch` requests run at a time (throughput
            mode): 1 / requests a second. Infinite if not even one request fits.
        batch: requests at a time in throughput mode.
        fits: weights and one request's keys fit into the memory.
    """

    first_token: float
    sync: float
    throughput: float
    batch: int
    fits: bool


class CostModel:
    """FLOPs and bytes of the passes of one architecture, without its MTP head."""

    def __init__(self, architecture: Mellum2Architecture) -> None:
        self.architecture = architecture

    @cached_property
    def weights(self) -> int:
        """Number of weights without the MTP head."""
        return self.architecture.num_parameters(mtp=False)

    @cached_property
    def _kinds(self) -> dict[tuple[LayerType, str], tuple[int, dict[str, int]]]:
        """(Attention, MLP) -> number of such layers, and weights of one by operation."""
        model = self.architecture
        first: dict[int, tuple[LayerType, str]] = {}
        counts: dict[tuple[LayerType, str], int] = {}
        for layer in range(model.num_hidden_layers):
            kind = (model.layer_type(layer), model.mlp_type(layer))
            if kind not in counts:
                first[layer] = kind
            counts[kind] = counts.get(kind, 0) + 1
        weights: dict[tuple[LayerType, str], dict[str, int]] = {kind: {} for kind in counts}
        for parameter in model.parameters(mtp=False):
            # Experts are equal in size: the first stands for all.
            if parameter.layer not in first or len(parameter.shape) < 2 or parameter.expert:
                continue
            name = _operation(parameter.name)
            of_kind = weights[first[parameter.layer]]
            of_kind[name] = of_kind.get(name, 0) + parameter.numel
        return {kind: (counts[kind], weights[kind]) for kind in counts}

    def key_bytes(self, tokens: int) -> int:
        """Return the bytes of keys and values that one sequence of ``tokens`` keeps."""
        per_token = self.architecture.cached_channels * BF16
        return sum(
            count * per_token * self._visible(kind, tokens)
            for (kind, _), (count, _) in self._kinds.items()
        )

    def _visible(self, kind: LayerType, tokens: int) -> int:
        window = self.architecture.sliding_window
        return min(tokens, window) if kind == "sliding_attention" and window else tokens

    def touched_experts(self, tokens: int) -> float:
        """Return the expected number of experts of a layer that ``tokens`` tokens use.

        Under uniform, independent routing: E (1 - (1 - k/E)^tokens).
        """
        experts, chosen = self.architecture.num_experts, self.architecture.num_experts_per_tok
        return float(experts * (1 - (1 - chosen / experts) ** tokens))

    def operations(self, sequences: int, new: int, past: int) -> Iterator[tuple[int, Operation]]:
        """Yield (repetitions, operation) of one forward pass.

        Args:
            sequences: sequences of the batch.
            new: new tokens of each sequence: its prompt, or 1 in decoding.
            past: tokens of each sequence that are already in the cache.
        """
        model, tokens = self.architecture, sequences * new
        hidden, (wide, value) = model.hidden_size, model.head_widths
        # Queries, and the outputs of all heads.
        queries, width = model.num_attention_heads * wide, model.num_attention_heads * value
        row = tokens * BF16  # bytes of one activation channel

        def product(name: str, weights: float, channels: float, read: float = 0) -> Operation:
            """Return a matrix product of all tokens that reads ``read`` weights (0: all)."""
            return Operation(name, 2 * tokens * weights, BF16 * (read or weights) + row * channels)

        yield 1, Operation("embedding", 0, 2 * row * hidden)
        for (kind, mlp), (count, weights) in self._kinds.items():
            yield count, product("qkv", weights["qkv"], hidden + queries + model.cached_channels)
            yield count, self._scores(kind, sequences, new, past)
            yield count, product("out", weights["out"], width + hidden)
            if mlp == "dense":
                inner = model.intermediate_size
                yield count, product("mlp up", weights["up"], hidden + 2 * inner)
                yield count, product("mlp down", weights["down"], inner + hidden)
            else:
                chosen, inner = model.num_experts_per_tok, model.moe_intermediate_size
                touched = self.touched_experts(tokens)
                yield count, product("router", weights["router"], hidden + model.num_experts)
                for name, channels in (("up", hidden + 2 * inner), ("down", inner + hidden)):
                    one = weights[f"expert {name}"]
                    yield (
                        count,
                        product(f"experts {name}", chosen * one, chosen * channels, touched * one),
                    )
                inner = model.shared_expert_intermediate_size or 0
                if inner:
                    yield count, product("shared up", weights["shared up"], hidden + 2 * inner)
                    yield count, product("shared down", weights["shared down"], inner + hidden)
            yield count * _ELEMENTWISE, Operation("elementwise", 0, 2 * row * hidden)
        # Only the last position of each sequence needs logits.
        head = model.vocab_size * hidden
        moved = head + sequences * (hidden + model.vocab_size)
        yield 1, Operation("output head", 2 * sequences * head, BF16 * moved)

    def _scores(self, kind: LayerType, sequences: int, new: int, past: int) -> Operation:
        """Return the attention of one layer: QK^T, softmax and PV as one fused kernel."""
        model = self.architecture
        total = past + new
        pairs = model.visible_pairs(kind, total)
        if past:
            pairs -= model.visible_pairs(kind, past)
        widths = model.head_widths
        if model.latent_attention is not None and past:
            # Queries meet the cached latents themselves: the matrix that makes keys and values of
            # them is applied to the query and to the output instead (arXiv 2405.04434, 2.1.2).
            widths = (model.cached_channels, model.latent_attention.kv_lora_rank)
        width = model.num_attention_heads * sum(widths)
        # A window's keys before the first new token, and the new ones.
        read = min(total, new + self._visible(kind, past + 1) - 1)
        moved = model.cached_channels * (read + new) + width * new
        return Operation("attention", sequences * 2 * width * pairs, sequences * BF16 * moved)

    def seconds(self, machine: Machine, *, sequences: int, new: int, past: int) -> float:
        """Return the time of one forward pass; arguments as for `operations`."""
        return sum(
            count * operation.seconds(machine)
            for count, operation in self.operations(sequences, new, past)
        )

    def largest_batch(self, machine: Machine, workload: Workload) -> int:
        """Return the number of requests whose keys fit beside the weights, 0 to ``max_batch``."""
        free = MEMORY_SHARE * machine.memory - BF16 * self.weights
        fitting = int(free // self.key_bytes(workload.prompt + workload.output))
        return max(0, min(fitting, workload.max_batch))

    def latency(self, machine: Machine, workload: Workload) -> Latency:
        """Return the analytic times of a request on ``machine``."""
        first = self.seconds(machine, sequences=1, new=workload.prompt, past=0)
        batch = self.largest_batch(machine, workload)
        throughput = float("inf")
        if batch:
            # In a steady state each request costs its own prefill, and a share of the steps.
            throughput = first + self._decoding(machine, workload, batch) / batch
        return Latency(
            first_token=first,
            sync=first + self._decoding(machine, workload, 1),
            throughput=throughput,
            batch=batch,
            fits=batch > 0,
        )

    def _decoding(self, machine: Machine, workload: Workload, batch: int) -> float:
        """Return the seconds of all steps after the first token.

        The step in the middle stands for all: keys grow by one token a step, so their cost is
        linear.
        """
        steps = workload.output - 1  # the prefill gives the first token
        middle = workload.prompt + steps // 2
        return steps * self.seconds(machine, sequences=batch, new=1, past=middle)


def _operation(name: str) -> str:
    """Return the fused operation that a weight belongs to.

    >>> _operation("model.layers.0.self_attn.k_proj.weight")
    'qkv'
    >>> _operation("model.layers.0.mlp.experts.0.gate_proj.weight")
    'expert up'
    """
    matrix = name.split(".")[-2]
    if "self_attn" in name:
        return "out" if matrix == "o_proj" else "qkv"
    if matrix == "gate":
        return "router"
    part = "down" if matrix == "down_proj" else "up"
    for place, prefix in ((".experts.", "expert "), (".shared_expert.", "shared ")):
        if place in name:
            return prefix + part
    return part


def require_context(architecture: Mellum2Architecture, workload: Workload) -> None:
    """Refuse a request that is longer than the model's context.

    Raises:
        InputError: it is.
    """
    length = workload.prompt + workload.output
    if length > architecture.max_position_embeddings:
        raise InputError(
            f"--prompt {workload.prompt} --output {workload.output}",
            rule=f"together at most max_position_embeddings="
            f"{architecture.max_position_embeddings} tokens",
            fix="lower one of the two",
        )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two series of equal length, two values or more.

    >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
    0.5
    """
    import numpy as np

    ranks = [_ranks(values) for values in (first, second)]
    return round(float(np.corrcoef(ranks[0], ranks[1])[0, 1]), 12)


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value from 0; equal values share the mean of their ranks."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]
