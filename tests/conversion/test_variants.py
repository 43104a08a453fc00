"""Keys of the variants' checkpoints, and exports that the released format cannot hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conversion.convert import export_hf, open_checkpoint
from conversion.exportable import ROUTER_BIAS
from conversion.mapping import derive, extra_states, megatron_shapes
from conversion.verification.megatron_scoring import load_megatron_model
from mellum2_megatron.architecture import LatentAttention, Mellum2Architecture
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.checkpoint.folder import write_architecture, write_tracker
from mellum2_megatron.common.errors import InputError
from tests.model.hf_reference import SMALL

pytestmark = pytest.mark.usefixtures("megatron_world")

LATENT = LatentAttention(kv_lora_rank=10, qk_nope_head_dim=12, qk_rope_head_dim=6, v_head_dim=14)
VARIANTS = {
    "released": SMALL,
    "all_dense": SMALL.replace(mlp_layer_types=("dense",) * 4),
    "dense_and_sparse": SMALL.replace(mlp_layer_types=("dense", "sparse", "sparse", "dense")),
    "shared_expert": SMALL.replace(shared_expert_intermediate_size=20),
    "two_mtp_layers": SMALL.replace(num_mtp_layers=2),
    "latent_attention": SMALL.replace(latent_attention=LATENT),
    "latent_queries_and_dense": SMALL.replace(
        latent_attention=replace(LATENT, q_lora_rank=20),
        mlp_layer_types=("sparse", "dense", "sparse", "dense"),
    ),
    "shared_and_dense": SMALL.replace(
        mlp_layer_types=("sparse", "dense", "sparse", "dense"), shared_expert_intermediate_size=20
    ),
}


@pytest.mark.parametrize("architecture", VARIANTS.values(), ids=VARIANTS)
def test_keys_and_shapes_are_those_that_megatron_saves(architecture: Mellum2Architecture) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    from mellum2_megatron.model.provider import build_model

    model = build_model(architecture, backend="torch")
    state = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    objects = {item.unique_key for item in state.values() if isinstance(item, ShardedObject)}
    assert objects <= set(extra_states(architecture))
    weights: dict[str, tuple[int, ...]] = {}
    for item in state.values():
        if isinstance(item, ShardedTensorFactory):
            weights |= {part.key: tuple(part.global_shape) for part in item.build()}
        elif not isinstance(item, ShardedObject):
            weights[item.key] = tuple(item.global_shape)
    assert weights == megatron_shapes(derive(architecture))


def saved(folder: Path, architecture: Mellum2Architecture, *, bias: bool = False) -> Path:
    """Save a random model as Megatron does; return its folder."""
    from megatron.core import dist_checkpointing

    from mellum2_megatron.model.provider import build_model
    from mellum2_megatron.model.router_variants import enable_router_bias
    from mellum2_megatron.model.transformer_config import transformer_config

    config = transformer_config(architecture)
    if bias:
        enable_router_bias(config, 0.01)
    model = build_model(architecture, backend="torch", config=config)
    for name, buffer in model.named_buffers():
        if name.endswith(ROUTER_BIAS):
            buffer.uniform_(-0.3, 0.3)
    (folder / "iter_0000003").mkdir(parents=True)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder / "iter_0000003"))
    write_tracker(folder, 3)
    write_architecture(folder, architecture)
    return folder


def test_an_export_without_a_form_is_refused(tmp_path: Path) -> None:
    shared = saved(tmp_path / "shared", VARIANTS["shared_expert"])
    with pytest.raises(InputError, match="MellumForCausalLM has no shared expert"):
        export_hf(shared, tmp_path / "hf")
    deeper = saved(tmp_path / "deeper", VARIANTS["two_mtp_layers"])
    with pytest.raises(InputError, match="at most one multi-token-prediction layer"):
        export_hf(deeper, tmp_path / "hf")
    latent = saved(tmp_path / "latent", VARIANTS["latent_attention"])
    with pytest.raises(InputError, match="MellumForCausalLM has grouped queries only"):
        export_hf(latent, tmp_path / "hf")
    biased = saved(tmp_path / "biased", SMALL, bias=True)
    with pytest.raises(InputError, match="chooses experts by their scores alone"):
        export_hf(biased, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_scoring_loads_latent_attention(tmp_path: Path) -> None:
    folder = saved(tmp_path / "latent", VARIANTS["latent_queries_and_dense"])
    weights = dict(load_megatron_model(folder).named_parameters())
    reader = open_checkpoint(find_checkpoint(folder))
    key = "decoder.layers.2.self_attention.linear_kv_up_proj.weight"
    stored = reader.read(key, (0, 0), (4 * (12 + 14), 10))
    assert stored.std() > 0
    assert weights[key].tolist() == stored.tolist()


def test_scoring_loads_the_bias(tmp_path: Path) -> None:
    folder = saved(tmp_path / "biased", SMALL, bias=True)
    buffers = dict(load_megatron_model(folder).named_buffers())
    biases = [buffer for name, buffer in buffers.items() if name.endswith(ROUTER_BIAS)]
    assert len(biases) == SMALL.num_hidden_layers + 1
    reader = open_checkpoint(find_checkpoint(folder))
    stored = reader.read(f"decoder.layers.mlp{ROUTER_BIAS}", (2, 0), (1, SMALL.num_experts))
    assert stored.abs().max() > 0
    assert biases[2].tolist() == stored[0].tolist()
