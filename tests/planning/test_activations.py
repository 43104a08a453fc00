"""Activations: counts compared with what autograd saves and what exists, in the real modules."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mellum2_megatron.architecture import Mellum2Architecture, MlpType
from mellum2_megatron.config import Layout, Loss, Run
from mellum2_megatron.planning import activations
from mellum2_megatron.planning.activations import Modules, kept_size
from mellum2_megatron.planning.memory import _in_flight, memory_per_rank
from mellum2_megatron.upstream import patching
from mellum2_megatron.upstream.patches import PATCHES
from tests.layouts.worker import ARCHITECTURE
from tests.live_memory import LiveMemory, saved_by_module
from tests.planning.test_memory import run_with

pytestmark = pytest.mark.usefixtures("megatron_world")

SEQUENCES, LENGTH = 2, 128
TOKENS = SEQUENCES * LENGTH
BALANCED = {
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_aux_loss_coeff": 1e-3,
    "moe_z_loss_coeff": 1e-3,
}
"""Megatron's fields for the losses of a run's default."""


@pytest.fixture(scope="module", autouse=True)
def _patched() -> Iterator[None]:
    from megatron.core.transformer.moe.experts import SequentialMLP

    patching.install(PATCHES)
    with pytest.MonkeyPatch.context() as context:
        # On a CPU experts get further rows, up to whole blocks; the counts are of a GPU.
        context.setattr(SequentialMLP, "forward", SequentialMLP.forward.__wrapped__)
        yield


def planned(architecture: Mellum2Architecture, *overrides: str) -> Run:
    """Return a run of one rank with micro-batches of the size that is measured here."""
    changes = (f"data.sequence_length={LENGTH}", f"schedule.micro_batch_size={SEQUENCES}")
    run: Run = run_with(architecture, Layout(), *changes, "loss.head_chunk=null", *overrides)
    return run


def built(architecture: Mellum2Architecture, **fields: Any) -> Any:
    """Return a model of the torch backend in BF16."""
    from megatron.core.transformer.module import Float16Module

    from mellum2_megatron.model.provider import model_provider
    from mellum2_megatron.model.transformer_config import transformer_config

    config = transformer_config(
        architecture,
        use_cpu_initialization=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        **BALANCED | fields,
    )
    model = model_provider(architecture, "torch", loss=Loss(head_chunk=None))(config=config)
    return Float16Module(config, model).train()


def saved(architecture: Mellum2Architecture, **fields: Any) -> dict[str, int]:
    """Return the bytes that a forward pass saves, by module."""
    model = built(architecture, **fields)
    tokens = torch.randint(0, architecture.vocab_size, (SEQUENCES, LENGTH + 1))
    positions = torch.arange(LENGTH).expand(SEQUENCES, -1)
    with saved_by_module(model.module) as found:
        model(
            tokens[:, :-1],
            positions,
            None,
            labels=tokens[:, 1:].contiguous(),
            loss_mask=torch.ones(SEQUENCES, LENGTH),
        )
    return found


def below(found: dict[str, int], *starts: str) -> float:
    """Return the bytes a token of the modules whose names begin with one of ``starts``."""
    return sum(size for name, size in found.items() if name.startswith(starts)) / TOKENS


DENSE = ARCHITECTURE.replace(
    mlp_layer_types=("sparse", "dense", "sparse", "sparse"), shared_expert_intermediate_size=48
)


@pytest.mark.parametrize(
    ("architecture", "fields", "overrides"),
    [
        (ARCHITECTURE, {}, []),
        (ARCHITECTURE, {"moe_router_load_balancing_type": "none"}, ["loss.aux_loss_type=none"]),
        (
            ARCHITECTURE,
            {"moe_z_loss_coeff": None, "moe_aux_loss_coeff": 0.0},
            ["loss.z_loss_coef=0", "loss.aux_loss_coef=0"],
        ),
        (
            ARCHITECTURE,
            {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
            ["execution.recompute=moe"],
        ),
        (DENSE, {}, []),
        (ARCHITECTURE.replace(num_experts=8, num_experts_per_tok=3), {}, []),
        (ARCHITECTURE.replace(num_attention_heads=8, head_dim=32, hidden_size=96), {}, []),
    ],
    ids=["released", "no_aux_loss", "no_loss", "moe_again", "dense_shared", "experts", "widths"],
)
def test_each_part_of_a_layer_keeps_what_is_counted(
    architecture: Mellum2Architecture, fields: dict[str, Any], overrides: list[str]
) -> None:
    found, run = saved(architecture, **fields), planned(architecture, *overrides)
    modules = Modules.of(run, "torch", fp8=False)
    execution = run.execution
    for number in range(architecture.num_hidden_layers):
        layer, mlp = f"decoder.layers.{number}.", architecture.mlp_type(number)
        mask = activations.mask_size(run, modules, architecture.layer_types[number]) / TOKENS
        attention = activations.attention_tensors(architecture, modules)
        measured = below(found, f"{layer}input_layernorm", f"{layer}self_attention") - mask
        assert measured == pytest.approx(kept_size(attention, execution), abs=0.5)
        norm = activations.norm_tensors("norm", architecture.hidden_size, modules)
        assert below(found, f"{layer}pre_mlp_layernorm") == kept_size(norm, execution)
        if mlp == "dense":
            dense = activations.dense_tensors(architecture, modules)
            assert below(found, f"{layer}mlp") == kept_size(dense, execution)
            continue
        experts = activations.expert_tensors(
            architecture, run.layout, modules, rows=architecture.num_experts_per_tok
        )
        assert below(found, f"{layer}mlp.experts") == kept_size(experts, execution)
        # The shared expert and the router read the same tensor; the first of them saves it.
        rest = [
            *activations.router_tensors(architecture, modules),
            *activations.shared_expert_tensors(architecture, modules),
        ]
        parts = (f"{layer}mlp", f"{layer}mlp.router")
        measured = sum(found.get(name, 0) for name in parts) / TOKENS
        measured += below(found, f"{layer}mlp.shared_experts")
        assert measured == pytest.approx(kept_size(rest, execution), abs=0.5)


@pytest.mark.parametrize("mtp_layers", [0, 1])
def test_the_whole_model_keeps_what_is_counted(mtp_layers: int) -> None:
    kinds = ("sliding_attention",) * mtp_layers
    architecture = ARCHITECTURE.replace(num_mtp_layers=mtp_layers, mtp_layer_types=kinds)
    measured = sum(saved(architecture).values())
    counted = memory_per_rank(planned(architecture), world_size=1, backend="torch").activations
    # Left out: token ids, the loss mask and its sums, 0.2% here.
    assert counted == pytest.approx(measured, rel=3e-3)
    if mtp_layers:
        found = saved(architecture)
        modules = Modules.of(planned(architecture), "torch", fp8=False)
        parts = ("enorm", "hnorm", "eh_proj", "final_layernorm")
        around = below(found, *(f"mtp.layers.0.{part}" for part in parts))
        assert around == kept_size(
            activations.mtp_tensors(architecture, modules), planned(architecture).execution
        )


# -- Peaks -----------------------------------------------------------------------------------------

HIDDEN, VOCABULARY, HEAD_TOKENS = 64, 2048, 512


def head_memory(chunk: int | None) -> tuple[int, int]:
    """Return the bytes that a head keeps, and those on top at its peak, forward and backward."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    from mellum2_megatron.model.chunked_head import ChunkedHead

    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    given = torch.randn(HEAD_TOKENS, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (1, HEAD_TOKENS))

    def whole(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight.t()
        losses: torch.Tensor = vocab_parallel_cross_entropy(logits, labels.transpose(0, 1))
        return losses

    def chunked(hidden: torch.Tensor) -> torch.Tensor:
        layer: Any = SimpleNamespace(weight=weight, sequence_parallel=False)
        head = ChunkedHead(layer, chunk or 0, get_tensor_model_parallel_group())
        head(hidden)
        return head.loss(labels, hidden, None)

    with LiveMemory() as live:
        weight.view(-1)  # seen before anything is counted
        hidden = given * 1.0
        before = live.now
        loss = (whole if chunk is None else chunked)(hidden)
        kept, peak = live.now - before, live.peak - before
        live.peak = live.now
        loss.sum().backward()  # type: ignore[no-untyped-call]
        return kept, max(peak, live.peak - before) - kept


@pytest.mark.parametrize("chunk", [None, 64, 128, HEAD_TOKENS])
def test_a_head_needs_what_is_counted(chunk: int | None) -> None:
    architecture = ARCHITECTURE.replace(hidden_size=HIDDEN, vocab_size=VOCABULARY)
    kept, peak = head_memory(chunk)
    execution = planned(architecture).execution
    if chunk is None:
        tensors = activations.whole_head_tensors(architecture)
        # Its input exists already.
        counted = HEAD_TOKENS * (kept_size(tensors, execution) - 2 * HIDDEN)
    else:
        counted = activations.chunked_head_size(architecture, Layout(), HEAD_TOKENS)
    assert kept == pytest.approx(counted, rel=0.02)
    transient = activations.head_transient(architecture, Layout(), HEAD_TOKENS, chunk)
    assert peak == pytest.approx(transient, rel=0.1)


@pytest.mark.parametrize("again", [(), ("moe",)], ids=["kept", "moe_again"])
def test_a_layer_needs_no_more_than_is_counted(again: tuple[str, ...]) -> None:
    """Experts are most of a layer: their peak above what is kept, forward and backward."""
    architecture = ARCHITECTURE.replace(
        hidden_size=128, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=4
    )
    words = [f"execution.recompute={','.join(again)}"] if again else []
    fields = (
        {"recompute_granularity": "selective", "recompute_modules": list(again)} if again else {}
    )
    run, tokens = planned(architecture, *words), 2048
    mlp = built(architecture, **fields).module.decoder.layers[1].mlp
    given = torch.randn(tokens, 1, 128, dtype=torch.bfloat16, requires_grad=True)
    with LiveMemory() as live:
        hidden = given * 1.0
        for weight in mlp.parameters():
            weight.view(-1)
        before = live.now
        output, _ = mlp(hidden)
        kept, peak = live.now - before, live.peak - before
        live.peak = live.now
        gradient = torch.ones_like(output)
        output.backward(gradient)
        gradients = sum(2 * weight.numel() for weight in mlp.parameters())
        peak = max(peak, live.peak - before - gradients) - kept
    modules = Modules.of(run, "torch", fp8=False)
    rows: float = architecture.num_experts_per_tok
    tensors = [
        *activations.router_tensors(architecture, modules),
        *activations.expert_tensors(architecture, run.layout, modules, rows=rows),
    ]
    sparse: MlpType = "sparse"
    counted = tokens * activations.layer_transient(
        architecture, run.layout, tensors, run.execution, sparse, rows=rows
    )
    assert 0.7 * counted < peak < counted


# -- Layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pp", "vpp", "overlap"),
    [(2, 1, False), (4, 1, False), (2, 2, False), (4, 2, True), (2, 4, True)],
)
def test_micro_batches_in_flight_are_megatrons(pp: int, vpp: int, overlap: bool) -> None:
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    for stage in range(pp):
        _, _, warm_up, _ = get_pp_rank_microbatches(
            64,
            vpp,
            pp,
            forward_only=False,
            overlap_moe_expert_parallel_comm=overlap,
            p2p_communicator=SimpleNamespace(
                pp_group=SimpleNamespace(size=lambda: pp, rank=lambda stage=stage: stage),
                virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            ),
        )
        layout: Any = SimpleNamespace(pp=pp, vpp=vpp, overlap_expert_comm=overlap)
        run: Any = SimpleNamespace(layout=layout)
        assert _in_flight(run, stage) == (warm_up + 1) / vpp
