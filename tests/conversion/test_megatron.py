"""Megatron loads an import, its save is exported, and logits agree with transformers'."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.convert import export_hf, import_hf
from conversion.huggingface.scoring import score_hf
from conversion.mapping import derive, extra_states, megatron_shapes
from conversion.torch_dist.reader import TorchDistReader
from conversion.verification.verify import (
    Agreement,
    compare,
    default_tokens,
    require_same_model,
    verify,
)
from mellum2_megatron.architecture import PRESETS
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.checkpoint.folder import write_architecture, write_tracker
from mellum2_megatron.common.errors import InputError
from tests.conversion.folders import VARIANTS, load_tensors, models, save_tensors, write_folder

pytestmark = pytest.mark.usefixtures("megatron_world")


def load(root: Path) -> Any:
    """Build the torch-backend model and load a checkpoint as ``megatron.training --load`` does."""
    from megatron.core import dist_checkpointing

    from mellum2_megatron.model.provider import build_model

    folder = find_checkpoint(root)
    model = build_model(folder.architecture, backend="torch")
    sharded = {"model": model.sharded_state_dict(metadata={"singleton_local_shards": False})}
    loaded = dist_checkpointing.load(sharded, str(folder.iteration_dir))
    model.load_state_dict(loaded["model"], strict=True)
    return model


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_of_an_import_are_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    from mellum2_megatron.model.scoring import score_tokens

    source = write_folder(tmp_path / "hf", changes, dtype=torch.float32)
    import_hf(source, tmp_path / "megatron")
    model = load(tmp_path / "megatron")
    tokens = torch.randint(0, 96, (2, 60), generator=torch.Generator().manual_seed(1))
    report = compare(*score_tokens(model, tokens), *score_hf(source, tokens), tolerance=1e-5)
    assert report.ok, report
    assert report.main.top1 == 1.0
    assert (report.mtp is None) == (changes.get("num_mtp_layers", 1) is None)


def test_verify_from_folder_to_report(hf_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = verify(checkpoint, hf_folder)
    assert report.ok
    assert (report.sequences, report.length) == (2, 64)
    with pytest.raises(InputError, match="num_mtp_layers=1 in the Megatron checkpoint, 0 in"):
        verify(checkpoint, write_folder(tmp_path / "other", VARIANTS["no_mtp"]))
    with pytest.raises(InputError, match="token id 96"):
        verify(checkpoint, hf_folder, torch.tensor([[96]]))


def test_every_key_megatron_asks_for_is_written(checkpoint: Path) -> None:
    """`load` already fails for a missing key; this test names it, and finds superfluous weights."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    from mellum2_megatron.model.provider import build_model

    architecture = find_checkpoint(checkpoint).architecture
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


def test_export_of_what_megatron_saves(hf_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    model = load(checkpoint).bfloat16()
    iteration = tmp_path / "run" / "iter_0000003"
    iteration.mkdir(parents=True)
    dist_checkpointing.save({"model": model.sharded_state_dict(), "iteration": 3}, str(iteration))
    write_tracker(tmp_path / "run", 3)
    write_architecture(tmp_path / "run", find_checkpoint(checkpoint).architecture)
    assert TorchDistReader(iteration).skipped["Transformer Engine extra state"]
    export_hf(tmp_path / "run", tmp_path / "out")
    before, after = load_tensors(hf_folder), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert find_checkpoint(tmp_path / "run").iteration == 3


def _swap_gate_and_up(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "gate_proj" in name]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def _swap_mtp_norms(tensors: dict[str, torch.Tensor]) -> None:
    a, b = "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _swap_experts(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("gate_proj", "up_proj", "down_proj"):
        a, b = (f"model.layers.1.mlp.experts.{expert}.{part}.weight" for expert in (0, 2))
        tensors[a], tensors[b] = tensors[b], tensors[a]


def _swap_query_heads(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    tensors[name] = tensors[name].reshape(4, 8, 24)[[0, 2, 1, 3]].reshape(32, 24)


@pytest.mark.parametrize(
    "wrong", [_swap_gate_and_up, _swap_mtp_norms, _swap_experts, _swap_query_heads]
)
def test_verification_sees_a_wrong_mapping(wrong: Any, tmp_path: Path) -> None:
    """One confusion of weights moves the logits far apart, so the comparison can fail."""
    from mellum2_megatron.model.scoring import score_tokens

    source = write_folder(tmp_path / "hf", dtype=torch.float32)
    import_hf(source, tmp_path / "megatron")
    tensors = load_tensors(source)
    wrong(tensors)
    save_tensors(source, tensors)
    tokens = default_tokens(find_checkpoint(tmp_path / "megatron").architecture)
    report = compare(*score_tokens(load(tmp_path / "megatron"), tokens), *score_hf(source, tokens))
    assert not report.ok
    assert "DIFFER" in str(report.table().title)
    if wrong is _swap_mtp_norms:
        assert report.main.relative_error < 1e-5  # and the trunk is not blamed
    assert report.mtp is not None
    assert report.mtp.relative_error > 1e-2


# -- transformers' side, without Megatron --------------------------------------------------------


def test_scores_are_what_transformers_generation_drafts(tmp_path: Path) -> None:
    """MTP logits at t are the draft after t + 2 tokens of generation (`MtpModel.forward`)."""
    from transformers.cache_utils import MtpCache

    main, mtp = models({})
    assert mtp is not None
    source = write_folder(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(0, 96, (2, 50), generator=torch.Generator().manual_seed(2))
    logits, mtp_logits = score_hf(source, tokens)
    assert mtp_logits is not None
    assert logits.shape == mtp_logits.shape == (2, 50, 96)
    with torch.no_grad():
        output = main(tokens, output_hidden_states=True)
        torch.testing.assert_close(logits, output.logits, rtol=1e-5, atol=1e-5)
        for t in (0, 4, 5, 31, 48):
            _, drafted, _ = mtp(
                input_ids=tokens[:1, 1 : t + 2],
                last_hidden_states=output.hidden_states[-1][:1, : t + 1],
                attention_mask=None,
                position_ids=torch.arange(1, t + 2)[None],
                mtp_cache=MtpCache(config=main.config.get_mtp_config()),
            )
            torch.testing.assert_close(mtp_logits[:1, t], drafted[:, 0], rtol=1e-5, atol=1e-5)


def test_mtp_layer_of_a_type_the_trunk_does_not_have(tmp_path: Path) -> None:
    """transformers' own `MtpModel` would fail: it uses the trunk's rotary embedding."""
    from mellum2_megatron.model.scoring import score_tokens

    source = write_folder(
        tmp_path / "hf", {"layer_types": ["full_attention"] * 3}, dtype=torch.float32
    )
    import_hf(source, tmp_path / "megatron")
    tokens = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(3))
    report = compare(
        *score_tokens(load(tmp_path / "megatron"), tokens),
        *score_hf(source, tokens),
        tolerance=1e-5,
    )
    assert report.ok, report
    assert report.mtp is not None


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[0, 96]]), "token id 96"),
        (torch.tensor([[-1, 3]]), "token id -1"),
        (torch.tensor([1, 2]), r"\[2\]"),
        (torch.zeros(0, 4, dtype=torch.int64), r"\[0, 4\]"),
        (torch.zeros(1, 4), "float32"),
    ],
)
def test_tokens_that_cannot_be_scored(tokens: torch.Tensor, message: str, hf_folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        score_hf(hf_folder, tokens)


def test_agreement_figures() -> None:
    reference = torch.tensor([[[0.0, 4.0], [1.0, 0.0]]])
    agreement = Agreement.of(
        torch.tensor([[[0.0, 3.0], [0.0, 0.0]]]) + torch.tensor([0.0, 0.5]), reference
    )
    assert agreement == Agreement(max_error=1.0, mean_error=0.5, relative_error=0.25, top1=0.5)
    nan = Agreement.of(torch.full((1, 2, 2), float("nan")), reference)
    assert not dataclasses.replace(compare(reference, None, reference, None), main=nan).ok
    assert compare(reference, None, reference, None).ok


def test_only_differences_that_matter_make_another_model() -> None:
    tiny = PRESETS["mellum2-tiny"]
    require_same_model(
        tiny, tiny.replace(initializer_range=0.1, eos_token_id=3, max_position_embeddings=2048)
    )
    with pytest.raises(InputError, match="sliding_window=64 in the Megatron checkpoint, 65 in"):
        require_same_model(tiny, tiny.replace(sliding_window=65))
