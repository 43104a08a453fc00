"""Initial weights by name: equal to the bit in every layout, and in models that share a tensor."""

from __future__ import annotations

import re

import pytest
import torch

from mellum2_megatron.architecture import LatentAttention
from mellum2_megatron.cpu import single_process
from tests.distributed import run_distributed
from tests.layouts.initial_weights_worker import SEED
from tests.layouts.worker import ARCHITECTURE, Case, build, shard

Weights = dict[str, torch.Tensor]

VARIANT = (
    ("mlp_layer_types", ("dense", "sparse", "sparse", "dense")),
    ("shared_expert_intermediate_size", 48),
)

LATENT = (
    (
        "latent_attention",
        LatentAttention(
            kv_lora_rank=10, q_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=6, v_head_dim=14
        ),
    ),
)

LAYOUTS: dict[str, tuple[int, Case]] = {
    "tp2_etp2": (2, Case(tp=2, etp=2)),
    "ep2": (2, Case(ep=2)),
    "pp2_vpp2": (2, Case(pp=2, vpp=2)),
    "tp2_ep2_pp2": (4, Case(tp=2, ep=2, pp=2)),
    "variant_tp2_pp2": (4, Case(tp=2, pp=2, changes=VARIANT)),
    "latent_tp2": (2, Case(tp=2, changes=LATENT)),
}


def drawn(case: Case, seed: int | None = SEED) -> Weights:
    with single_process():
        (model,) = build(case, "cpu", seed_by_name=seed)
        return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def base() -> Weights:
    """Weights of the model on one process."""
    return drawn(Case())


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_start_from_equal_weights(layout: str, base: Weights):
    nproc, case = LAYOUTS[layout]
    want = drawn(Case(changes=case.changes)) if case.changes else base
    outcomes = run_distributed("tests.layouts.initial_weights_worker:weights", nproc, case)
    names = set()
    for ranks, weights in outcomes:
        for name, weight in weights.items():
            assert torch.equal(weight, shard(name, want[name], case, ranks)), name
        names |= set(weights)
    assert names == set(want)


@pytest.mark.parametrize(
    ("changes", "differ"),
    [
        ((("num_mtp_layers", 0), ("mtp_layer_types", ())), "^mtp"),
        ((("num_key_value_heads", 4),), "linear_qkv.weight"),
        (
            (
                ("num_hidden_layers", 6),
                ("layer_types", ("sliding_attention",) * 5 + ("full_attention",)),
            ),
            r"decoder.layers.[45]\.",
        ),
        (VARIANT[:1], r"decoder.layers.[03].mlp|mlp.linear_fc"),
        (VARIANT[1:], "shared_experts"),
        ((("num_experts", 8),), r"router.weight|local_experts.[4-7]\."),
        ((("vocab_size", 128),), "word_embeddings|output_layer"),
        (LATENT, "self_attention"),
    ],
    ids=[
        "no_mtp",
        "kv_heads",
        "deeper",
        "dense_layers",
        "shared_expert",
        "experts",
        "vocabulary",
        "latent_attention",
    ],
)
def test_models_share_every_tensor_of_equal_name_and_shape(
    changes: tuple[tuple[str, object], ...], differ: str, base: Weights
):
    other = drawn(Case(changes=changes))
    alike = [name for name in base if name in other and other[name].shape == base[name].shape]
    assert all(torch.equal(other[name], base[name]) for name in alike)
    # Not fewer than meant.
    unlike = {name for name in base.keys() | other.keys() if name not in alike}
    assert unlike
    assert len(alike) > 20
    assert all(re.search(differ, name) for name in unlike), unlike


def test_order_shares_less(base: Weights):
    """Megatron's order: after the first other shape nothing is equal."""
    more_heads = Case(changes=(("num_key_value_heads", 4),))
    one, other = drawn(Case(), seed=None), drawn(more_heads, seed=None)
    name = "decoder.layers.3.self_attention.linear_proj.weight"
    assert one[name].shape == other[name].shape
    assert not torch.equal(one[name], other[name])
    assert torch.equal(base[name], drawn(more_heads)[name])


def test_statistics_are_the_configurations(base: Weights):
    deviation = ARCHITECTURE.initializer_range
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, weight in base.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            kinds.setdefault(re.sub(r"\.\d+\.", ".N.", name), []).append(weight.flatten())
    assert len(kinds) == 13
    for name, parts in kinds.items():
        values = torch.cat(parts)
        error = deviation / len(values) ** 0.5
        assert abs(values.mean()) < 5 * error, name
        assert abs(values.std() - deviation) < 5 * error, name  # of the deviation: error / sqrt 2


def test_no_two_tensors_are_alike(base: Weights):
    starts = [tuple(weight.flatten()[:8].tolist()) for weight in base.values() if weight.dim() > 1]
    assert len(set(starts)) == len(starts)


def test_the_seed_decides_and_the_generators_stay(base: Weights):
    name = "embedding.word_embeddings.weight"
    assert torch.equal(drawn(Case())[name], base[name])
    assert not torch.equal(drawn(Case(), seed=SEED + 1)[name], base[name])
    with single_process():
        states = []
        for seed in (None, SEED):
            torch.manual_seed(3)
            build(Case(), "cpu", seed_by_name=seed)
            states.append(torch.get_rng_state())
    assert torch.equal(*states)
