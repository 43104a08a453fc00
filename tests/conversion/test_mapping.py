"""The mapping table against hand-written shapes and transformers; transforms against loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from conversion import mapping
from conversion.mapping import (
    derive,
    extra_states,
    fused_experts,
    huggingface_shapes,
)
from conversion.rows import GroupedHeads, StackedRows
from mellum2_megatron.architecture import PRESETS, Mellum2Architecture, from_hf_config
from tests.conversion.folders import VARIANTS, models, mtp_tensors, unfused


def architecture_of(changes: dict[str, Any]) -> Mellum2Architecture:
    return from_hf_config(models(changes)[0].config.to_dict())


def test_released_model_has_the_published_count_of_tensors_and_values() -> None:
    with_mtp, without = PRESETS["mellum2-12b"], PRESETS["mellum2-12b"].replace(num_mtp_layers=0)
    shapes = huggingface_shapes(derive(with_mtp))
    assert len(huggingface_shapes(derive(without))) == 5631
    assert sum(map(math.prod, huggingface_shapes(derive(without)).values())) == 12_149_923_072
    assert sum(map(math.prod, shapes.values())) == 12_578_294_528
    assert shapes["mtp.fc.weight"] == (2304, 4608)


def test_megatron_keys_and_shapes_of_the_released_model() -> None:
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (2304,),
        "self_attention.linear_qkv.weight": (5120, 2304),
        "self_attention.q_layernorm.weight": (128,),
        "self_attention.k_layernorm.weight": (128,),
        "self_attention.linear_proj.weight": (2304, 4096),
        "pre_mlp_layernorm.weight": (2304,),
        "mlp.router.weight": (64, 2304),
        "mlp.experts.experts.linear_fc1.weight": (64, 1792, 2304),
        "mlp.experts.experts.linear_fc2.weight": (64, 2304, 896),
    }
    assert mapping.megatron_shapes(derive(PRESETS["mellum2-12b"])) == {
        "embedding.word_embeddings.weight": (98304, 2304),
        **{f"decoder.layers.{name}": (28, *shape) for name, shape in layer.items()},
        "decoder.final_layernorm.weight": (2304,),
        "output_layer.weight": (98304, 2304),
        **{f"mtp.layers.0.transformer_layer.{name}": shape for name, shape in layer.items()},
        "mtp.layers.0.enorm.weight": (2304,),
        "mtp.layers.0.hnorm.weight": (2304,),
        "mtp.layers.0.eh_proj.weight": (2304, 4608),
        "mtp.layers.0.final_layernorm.weight": (2304,),
    }


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_names_and_shapes_are_those_of_transformers_modules(changes: dict[str, Any]) -> None:
    main, mtp = models(changes)
    tensors = {**main.state_dict(), **(mtp_tensors(mtp) if mtp is not None else {})}
    expected = {name: tuple(tensor.shape) for name, tensor in unfused(tensors).items()}
    assert huggingface_shapes(derive(architecture_of(changes))) == expected
    fused = {name: part.shape for name, part in fused_experts(architecture_of(changes)).items()}
    assert fused == {
        n: tuple(t.shape) for n, t in tensors.items() if n.endswith(("gate_up_proj", "down_proj"))
    }


def test_names_agree_with_the_architecture() -> None:
    for architecture in PRESETS.values():
        assert huggingface_shapes(derive(architecture)) == {
            p.name: p.shape for p in architecture.parameters()
        }


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_entries_cover_every_megatron_tensor_exactly(changes: dict[str, Any]) -> None:
    covered: dict[str, torch.Tensor] = {}
    architecture = architecture_of(changes)
    for entry in derive(architecture):
        count = covered.setdefault(entry.key, torch.zeros(entry.global_shape))
        count[
            tuple(
                slice(low, low + size) for low, size in zip(entry.offset, entry.extent, strict=True)
            )
        ] += 1
        assert math.prod(entry.shape) == sum(math.prod(source.shape) for source in entry.sources)
    assert all(bool((count == 1).all()) for count in covered.values())
    elements = sum(count.numel() for count in covered.values())
    assert elements == architecture.num_parameters(mtp=True)


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim"), [(4, 2, 8), (4, 1, 6), (4, 4, 2), (6, 3, 4)]
)
def test_query_key_value_interleave_against_a_loop(heads: int, groups: int, head_dim: int) -> None:
    hidden = 5
    architecture = architecture_of(
        {
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": head_dim,
            "hidden_size": hidden,
        }
    )
    q, k, v = (torch.randn(n * head_dim, hidden) for n in (heads, groups, groups))
    rows = []
    for group in range(groups):
        for head in range(group * heads // groups, (group + 1) * heads // groups):
            rows += [q[head * head_dim + i] for i in range(head_dim)]
        rows += [k[group * head_dim + i] for i in range(head_dim)]
        rows += [v[group * head_dim + i] for i in range(head_dim)]
    joined = GroupedHeads().join([q, k, v], architecture)
    assert torch.equal(joined, torch.stack(rows))
    for part, back in zip((q, k, v), GroupedHeads().split(joined, architecture), strict=True):
        assert torch.equal(part, back)


def test_gate_comes_before_up() -> None:
    gate, up = torch.full((2, 3), 1.0), torch.full((2, 3), 2.0)
    joined = StackedRows().join([gate, up], PRESETS["mellum2-tiny"])
    assert joined[:, 0].tolist() == [1, 1, 2, 2]
    assert [part[0, 0].item() for part in StackedRows().split(joined, PRESETS["mellum2-tiny"])] == [
        1,
        2,
    ]


def test_extra_state_keys() -> None:
    keys = extra_states(PRESETS["mellum2-12b"])
    assert len(keys) == len(set(keys)) == 28 * (5 + 2 * 64) + 1 + (5 + 2 * 64) + 4
    assert "decoder.layers.self_attention.linear_qkv._extra_state/shard_3_28" in keys
    assert "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_3.17_28.64" in keys
    assert (
        "mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc2._extra_state/shard_63_64"
        in keys
    )
    assert "mtp.layers.0.eh_proj._extra_state/shard_0_1" in keys


def test_a_table_that_names_something_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = mapping.Place(rows=mapping.HEAD)
    monkeypatch.setattr(mapping, "PLACES", (*mapping.PLACES, twice))
    with pytest.raises(ValueError, match=r"decoder\.final_layernorm.* appears twice"):
        derive(PRESETS["mellum2-tiny"])
