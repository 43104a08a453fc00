"""The optimizer report against Megatron's own model, optimizer and parameter layout."""

from __future__ import annotations

import io
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.planning.gradient_buffers import assign_owners, even_buffer, ownership
from mellum2_megatron.planning.optimizer_report import optimizer_report, render_optimizer
from mellum2_megatron.planning.rank_weights import local_weights
from mellum2_megatron.recipes import recipe
from tests import parameter_id
from tests.distributed import run_distributed
from tests.model.optimizer_worker import Outcome
from tests.model.test_muon import run_of

BIG = "mellum2_12b_pretrain_phase1"
OPTIONS = ("optimizer.muon_router=false", "optimizer.muon_mtp_projection=false")


VARIANT = (
    "layout.ep=2",
    "architecture.mlp_layer_types=[sparse,dense]",
    "architecture.shared_expert_intermediate_size=48",
    "architecture.latent_attention={kv_lora_rank: 24, q_lora_rank: 40, qk_nope_head_dim: 16, "
    "qk_rope_head_dim: 8, v_head_dim: 32}",
    "optimizer.muon_split_gate_up=true",
)


def report(run: Run, world_size: int, **kwargs: Any) -> dict[str, Any]:
    return optimizer_report(run, world_size=world_size, backend=kwargs.get("backend", "te"))


def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["weights"]}


# -- Compared with Megatron


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [
        (1, ()),
        (2, OPTIONS),
        (4, ("layout.ep=2",)),
        (4, ("layout.ep=2", "optimizer.overlap_grad_reduce=true")),
        (2, VARIANT),
        (4, ("layout.ep=2", "optimizer.muon_dense_shards=even")),
    ],
    ids=parameter_id,
)
def test_megatrons_optimizer_matches_the_report(nproc: int, overrides: tuple[str, ...]) -> None:
    """Names, shapes and order; optimizer, decay and rate; every rank's matrices; buffer lengths."""
    run = run_of(*overrides)
    outcomes: list[Outcome] = run_distributed(
        "tests.model.optimizer_worker:update", nproc, run, steps=0
    )
    weights = local_weights(run.architecture, run.layout, "torch")
    kinds = {weight.name: weight.kind for weight in weights}
    reported = rows(report(run, nproc, backend="torch"))
    owners = {each.group: each for each in ownership(run, nproc, "torch")}
    for rank, outcome in enumerate(outcomes):
        assert outcome.names == [(weight.name, weight.shape) for weight in weights]
        assert outcome.buffers == {group: each.buffer for group, each in owners.items()}
        for group, ranks in outcome.owned.items():
            expected = [sorted(weight.name for weight in own) for own in owners[group].owned]
            assert [sorted(names) for names in ranks] == expected, rank
        for name, part in outcome.parts.items():
            row = reported[kinds[local_name(name, run, rank)]]
            assert (
                row["optimizer"]
                == {"TensorParallelMuon": "muon", "FusedAdam": "adam"}[part.optimizer]
            ), name
            assert part.group == {"lr": row["lr"], "weight_decay": row["weight_decay"]}, name
    seen = {name for outcome in outcomes for name in outcome.parts}
    assert len(seen) == len(weights) + (run.layout.ep - 1) * sum(
        w.component == "experts" for w in weights
    )


def local_name(name: str, run: Run, rank: int) -> str:
    """Return the rank's own name of a weight named over the whole model."""
    count = run.architecture.num_experts // run.layout.ep
    for expert in range(run.architecture.num_experts):
        name = name.replace(f"local_experts.{expert}.", f"local_experts.{expert % count}.")
    return name


def test_pipeline_stages_hold_the_whole_model_once() -> None:
    """Every released weight lies on one stage, fused as in Megatron; the embedding lies on two."""
    run = apply_overrides(recipe(BIG), ["layout.pp=2", "layout.vpp=7", "layout.dp=128"])
    parts = [
        local_weights(run.architecture, run.layout, backend, stage=stage, chunk=chunk)
        for backend in ("te", "torch")
        for stage in range(2)
        for chunk in range(7)
    ]
    embedding = run.architecture.vocab_size * run.architecture.hidden_size
    experts = sum(p.numel for p in run.architecture.parameters() if p.component == "experts")
    total = run.architecture.num_parameters() - experts + experts // 8 + embedding
    assert sum(weight.numel for part in parts for weight in part) == 2 * total
    assert [any("embedding" in weight.name for weight in part) for part in parts[:14]] == [True] + [
        False
    ] * 12 + [True]
    assert (
        len({weight.name for part in parts[:14] for weight in part})
        == sum(map(len, parts[:14])) - 1
    )


@pytest.mark.parametrize("ranks", [1, 2, 8, 32, 256])
@pytest.mark.parametrize("bucket", [None, 40_000_000, 256_000_000])
def test_owners_are_megatrons(ranks: int, bucket: int | None) -> None:
    """Megatron's own layout function, on the sizes of the 12B's matrices and on random ones."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    run = apply_overrides(recipe(BIG), ["layout.ep=8"])
    real = [w.numel for w in local_weights(run.architecture, run.layout, "te") if len(w.shape) == 2]
    shuffled = random.Random(ranks)
    for sizes in (real, [shuffled.randrange(1, 90_000_000) for _ in range(200)]):
        # The function reads nothing else of a parameter.
        params = [
            SimpleNamespace(data=SimpleNamespace(nelement=lambda size=size: size)) for size in sizes
        ]
        stubs = [_Hashable(param) for param in params]
        layout = LayerWiseDistributedOptimizer._compute_per_buffer_param_layout(
            stubs, bucket, ranks, SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
        )
        expected = []
        for stub in stubs:
            start, _, number = layout.param_index_map[stub]
            first, last = layout.bucket_indices[number]
            expected.append((start - first) // ((last - first) // ranks))
        lengths = [end - start for start, end in layout.bucket_indices]
        assert assign_owners(sizes, ranks, bucket) == (expected, lengths)
        layout = DistributedOptimizer._compute_per_buffer_param_layout(
            stubs, bucket, ranks, SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
        )
        even = even_buffer(sizes, ranks, bucket)
        assert even.buckets == tuple(layout.bucket_indices)
        assert even.starts == tuple(layout.param_index_map[stub][0] for stub in stubs)


class _Hashable:
    def __init__(self, namespace: SimpleNamespace) -> None:
        self.data = namespace.data


# -- The report


def test_the_12b_as_the_report_trains_it() -> None:
    found = report(recipe(BIG), 256)
    reported = rows(found)
    qkv = reported["decoder.layers.*.self_attention.linear_qkv.weight"]
    assert (qkv["count"], qkv["optimizer"], qkv["weight_decay"], qkv["lr"]) == (
        28,
        "muon",
        0.1,
        3e-4,
    )
    assert [(m["part"], m["shape"]) for m in qkv["matrices"]] == [
        ("query", [4096, 2304]),
        ("key", [512, 2304]),
        ("value", [512, 2304]),
    ]
    assert [m["scale"] for m in qkv["matrices"]] == [0.2 * math.sqrt(4096), 0.2 * 48, 0.2 * 48]
    up = reported["decoder.layers.*.mlp.experts.linear_fc1.weight*"]
    assert (up["count"], [m["shape"] for m in up["matrices"]]) == (28 * 8, [[1792, 2304]])
    assert (
        reported["output_layer.weight"]["optimizer"]
        == reported["embedding.word_embeddings.weight"]["optimizer"]
        == "adam"
    )
    norm = reported["decoder.layers.*.pre_mlp_layernorm.weight"]
    assert (norm["optimizer"], norm["weight_decay"], norm["matrices"]) == ("adam", 0.0, [])
    dense, experts = found["owners"]
    assert (dense["ranks"], dense["matrices"], dense["matrices_per_rank"].count(0)) == (
        256,
        88,
        168,
    )
    assert (experts["ranks"], experts["matrices"]) == (32, 29 * 8 * 2)
    assert experts["balance"] < 1.1
    (warning,) = found["warnings"]
    assert "168 of 256 ranks" in warning
    assert "even share" in warning
    assert (dense["buckets"], dense["buffer_elements"]) == (3, 630_669_312)
    assert 0.99 < dense["exchanged_elements"] / 630_669_312 < 1
    whole = report(apply_overrides(recipe(BIG), ["optimizer.muon_dense_shards=whole"]), 256)
    assert (whole["owners"][0]["buckets"], whole["owners"][0]["exchanged_elements"]) == (1, 0)
    assert "13.4 GiB of every rank's buffers stay empty" in whole["warnings"][0]


def test_options_appear_in_the_report() -> None:
    chosen = [*OPTIONS, "optimizer.muon_split_gate_up=true"]
    reported = rows(report(apply_overrides(recipe(BIG), chosen), 256))
    parts = reported["mtp.layers.*.mtp_model_layer.mlp.experts.linear_fc1.weight*"]["matrices"]
    assert [(m["part"], m["shape"]) for m in parts] == [("gate", [896, 2304]), ("up", [896, 2304])]
    assert reported["decoder.layers.*.mlp.router.weight"]["optimizer"] == "adam"
    assert reported["mtp.layers.*.eh_proj.weight"]["optimizer"] == "adam"
    unsplit = rows(report(apply_overrides(recipe(BIG), ["optimizer.muon_split_qkv=false"]), 256))
    (whole,) = unsplit["decoder.layers.*.self_attention.linear_qkv.weight"]["matrices"]
    assert whole["shape"] == [5120, 2304]


def test_tensor_parallelism_divides_matrices_unless_they_are_gathered() -> None:
    changes = ["layout.tp=2", "layout.sp=true", "layout.etp=2", "layout.dp=null"]
    blockwise = report(apply_overrides(recipe(BIG), changes), 256)
    gathered = report(
        apply_overrides(recipe(BIG), [*changes, "optimizer.muon_tp_mode=duplicated"]), 256
    )
    shapes = {
        "decoder.layers.*.self_attention.linear_qkv.weight": [
            [2048, 2304],
            [256, 2304],
            [256, 2304],
        ],
        "decoder.layers.*.self_attention.linear_proj.weight": [[2304, 2048]],
        "decoder.layers.*.mlp.router.weight": [[64, 2304]],
        "mtp.layers.*.eh_proj.weight": [[1152, 4608]],
        "decoder.layers.*.mlp.experts.linear_fc2.weight*": [[2304, 448]],
    }
    alone = rows(report(recipe(BIG), 256))
    for name, expected in shapes.items():
        assert [m["shape"] for m in rows(blockwise)[name]["matrices"]] == expected
        assert rows(gathered)[name]["matrices"] == alone[name]["matrices"]
    assert any("depends on the layout" in warning for warning in blockwise["warnings"])
    assert not any("depends on the layout" in warning for warning in gathered["warnings"])


def test_adam_has_no_owners_of_matrices() -> None:
    found = report(apply_overrides(recipe(BIG), ["optimizer.name=adam"]), 256)
    assert found["owners"] == []
    assert {row["optimizer"] for row in found["weights"]} == {"adam"}


def test_layouts_that_upstream_would_train_differently_are_refused() -> None:
    """Beyond the number of KV heads Megatron stops splitting Q, K and V, with a DEBUG line."""
    run = apply_overrides(recipe(BIG), ["layout.tp=8", "layout.sp=true", "layout.dp=null"])
    with pytest.raises(InputError, match=r"layout\.tp=8.*num_key_value_heads \(4\)"):
        report(run, 256)


def test_tables_name_every_kind_in_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_optimizer(report(recipe(BIG), 256), title="big"))
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    for start in (
        "28 + 1 linear_qkv 5120 x 2304 muon",
        "224 + 8 experts.linear_fc2",
        "1 MTP eh_proj",
    ):
        assert any(line[: len(start.split())] == start.split() for line in lines), start
    assert sum(word in line for line in lines for word in ("adam", "muon")) == 16
    assert "query 4096 x 2304" in text
    assert "168 of 256 ranks" in text


# -- Refused when the optimizer is built


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.layers.0.mlp.experts.linear_fc1.weight", (4, 8, 8), "moe-single-grouped-weight"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (20, 8), "whole groups of 24 rows"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (48, 8), None),
        ("decoder.final_layernorm.weight", (8,), None),
    ],
    ids=parameter_id,
)
def test_weights_that_megatron_would_skip_are_refused(
    name: str, shape: tuple[int, ...], message: str | None
) -> None:
    import torch

    from mellum2_megatron.model.muon_attributes import require_muon_matrices

    config = SimpleNamespace(optimizer="muon", muon_split_qkv=True)
    model = SimpleNamespace(num_attention_heads=8, num_query_groups=2, kv_channels=4)
    chunk = SimpleNamespace(
        config=model, named_parameters=lambda: [(name, torch.nn.Parameter(torch.zeros(shape)))]
    )
    if message is None:
        require_muon_matrices(config, [chunk])
    else:
        with pytest.raises(InputError, match=message):
            require_muon_matrices(config, [chunk])
