"""Scoring on several ranks: the logits of one process; what a comparison can and cannot see."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conversion.convert import import_hf
from conversion.verification import megatron_scoring
from conversion.verification.megatron_scoring import score_rank
from conversion.verification.memory import (
    require_huggingface_memory,
    require_long_text_memory,
    require_rank_memory,
)
from conversion.verification.ranks import Ranks
from conversion.verification.score_folder import ScoreFolder, score_shapes
from conversion.verification.scoring import score_file
from conversion.verification.verify import default_tokens, unseen, verify
from mellum2_megatron.architecture import PRESETS
from mellum2_megatron.checkpoint import CheckpointFolder, find_checkpoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Layout
from tests.conversion.folders import write_folder
from tests.distributed import run_distributed

# Even numbers of heads, layers and experts, so that two ranks can divide each. YaRN's ramp runs
# from frequency 2 to 5 of 16, without `truncate` from 2.83 to 4.03.
EVEN: dict[str, Any] = {
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 2.0,
            "beta_slow": 1.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_experts": 4,
}
# An odd number of sequences and of tokens: the last data-parallel turn and the last chunk of a
# sequence are not full.
TOKENS = torch.randint(0, 96, (3, 45), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model that two ranks can divide: `hf`, and `megatron` imported from it."""
    root = tmp_path_factory.mktemp("even")
    write_folder(root / "hf", EVEN)
    import_hf(root / "hf", root / "megatron")
    return root


@pytest.fixture(scope="module")
def alone(
    even: Path, tmp_path_factory: pytest.TempPathFactory, megatron_world: None
) -> dict[str, torch.Tensor]:
    """All arrays of one process."""
    return scored(even, tmp_path_factory.mktemp("alone") / "scores").arrays()


def scored(root: Path, folder: Path, ranks: Ranks | None = None) -> ScoreFolder:
    """Score `TOKENS`, hidden states included, in this process or on the ranks given."""
    architecture = find_checkpoint(root / "megatron").architecture
    scores = ScoreFolder.create(folder, score_shapes(architecture, TOKENS, hidden=True))
    if ranks is None:
        score_rank(root / "megatron", TOKENS, scores.path, Ranks())
    else:
        run_distributed(
            "tests.conversion.rank_worker:score",
            ranks.count,
            root / "megatron",
            TOKENS,
            scores.path,
            ranks,
        )
    return scores


LAYOUTS = {
    "tp2": Layout(tp=2, sp=True),
    "pp2": Layout(pp=2),
    "ep2": Layout(ep=2),  # two data-parallel ranks, with three sequences
    "etp2": Layout(etp=2),
    "cp2": Layout(cp=2),
    "tp2_pp2": Layout(tp=2, sp=True, pp=2, etp=2),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_score_as_one_process(
    layout: str, even: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    scores = scored(even, tmp_path / "scores", Ranks(layout=LAYOUTS[layout])).arrays()
    assert scores.keys() == alone.keys() >= {"logits", "mtp_logits", "layer 3", "mtp layer 0"}
    for name, expected in alone.items():
        # The last MTP position has no next token.
        end = -1 if name.startswith("mtp") else None
        scale = float(expected.abs().max())
        error = float((scores[name] - expected)[:, :end].abs().max()) / scale
        assert error < 1e-5, f"{name}: off by {error:.1e}"


@pytest.mark.distributed
def test_a_rank_loads_its_part_only(even: Path, tmp_path: Path) -> None:
    """Four ranks that divide everything hold about a quarter each, not the whole model."""
    architecture = find_checkpoint(even / "megatron").architecture
    ScoreFolder.create(tmp_path / "scores", score_shapes(architecture, TOKENS, hidden=False))
    ranks = Ranks(layout=Layout(tp=2, sp=True, pp=2, ep=2))
    counts = run_distributed(
        "tests.conversion.rank_worker:score",
        4,
        even / "megatron",
        TOKENS,
        tmp_path / "scores",
        ranks,
    )
    whole = sum(parameter.shape.numel() for parameter in _parameters(even))
    # The last stage holds the MTP head, and a copy of the embedding for it.
    assert max(counts) < 0.5 * whole
    assert sum(counts) < 1.3 * whole


def _parameters(root: Path) -> list[torch.Tensor]:
    from tests.conversion.folders import load_tensors

    return list(load_tensors(root / "hf").values())


@pytest.mark.distributed
@pytest.mark.slow
def test_command_starts_its_ranks(even: Path, tmp_path: Path, megatron_world: None) -> None:
    """`mellum2 score --tp 2`, from the command line to the file; nothing else is left behind."""
    from mellum2_megatron.cli.ranks import start_ranks

    np.save(tmp_path / "tokens.npy", TOKENS.numpy())
    for name, ranks in (("one", Ranks()), ("two", Ranks(layout=Layout(tp=2, sp=True)))):
        score_file(
            tmp_path / "tokens.npy",
            tmp_path / f"{name}.npz",
            megatron_path=even / "megatron",
            limit=2,
            ranks=ranks,
            start=start_ranks,
        )
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert sorted(one) == sorted(two) == ["logits", "mtp_logits"]
    assert one["logits"].shape == (2, 45, 96)
    np.testing.assert_allclose(one["logits"], two["logits"], atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"tokens.npy", "one.npz", "two.npz"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"sliding_window": 6},
        {"sliding_window": 4},
        {"factor": 5.0},
        {"original_max_position_embeddings": 100},
        {"beta_fast": 4.0},
        {"beta_slow": 1.5},
        {"truncate": False},
    ],
    ids=lambda wrong: "_".join(f"{key}_{value}" for key, value in wrong.items()),
)
def test_verify_sees_a_wrong_window_and_a_wrong_yarn(
    wrong: dict[str, Any],
    even: Path,
    monkeypatch: pytest.MonkeyPatch,
    megatron_world: None,
) -> None:
    """Megatron computes with the changed value, transformers with the folder's; default tokens."""

    def changed(path: Path) -> CheckpointFolder:
        folder = find_checkpoint(path)
        architecture = folder.architecture
        if "sliding_window" in wrong:
            architecture = architecture.replace(**wrong)
        else:
            rope = dataclasses.replace(architecture.rope_full_attention, **wrong)
            architecture = architecture.replace(rope_full_attention=rope)
        return dataclasses.replace(folder, architecture=architecture)

    assert verify(even / "megatron", even / "hf").ok
    monkeypatch.setattr(megatron_scoring, "find_checkpoint", changed)
    report = verify(even / "megatron", even / "hf")
    assert not report.ok
    place = "layer 0" if "sliding_window" in wrong else "layer 1"
    assert report.first_departing is not None
    assert report.first_departing.name == place


def test_default_tokens_exceed_window_and_original_context() -> None:
    """Or else the report has a line for what they cannot test."""
    for preset in PRESETS.values():
        batch, length = default_tokens(preset).shape
        original = preset.rope_full_attention.original_max_position_embeddings or 0
        assert length > 2 * (preset.sliding_window or 0)
        assert length > min(original, preset.max_position_embeddings - 1)
        assert batch == (2 if length <= 4096 else 1)
        assert unseen(preset, length) == ()


def test_report_names_what_short_tokens_cannot_test(
    even: Path, megatron_world: None, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = TOKENS[:1, :5]  # the window is 5, the original context 64
    window, context = verify(even / "megatron", even / "hf", tokens).unseen
    assert "the sliding window (5) was not tested" in window
    assert "YaRN's original context (64)" in context
    assert verify(even / "megatron", even / "hf", torch.zeros(1, 65).long()).unseen == ()


def test_memory_is_refused_before_anything_is_loaded() -> None:
    """The released model in float32: 50.3 GB of weights in transformers."""
    model = PRESETS["mellum2-12b"]
    with pytest.raises(InputError, match=r"50\.31 GB of weights .* 40\.00 GB of memory are free"):
        require_huggingface_memory("hf", model, 2065, free=40 * 10**9)
    require_huggingface_memory("hf", model, 2065, free=60 * 10**9)
    # 131,072 tokens: 6 bytes for each pair of them.
    with pytest.raises(InputError, match=r"131,072 tokens: 50\.31 GB .* 103\.08 GB for attention"):
        require_long_text_memory("hf", model, 131072, free=150 * 10**9)
    require_long_text_memory("hf", model, 131072, free=160 * 10**9)
    with pytest.raises(InputError, match=r"--tp 2, --pp 2 or --ep 2"):
        require_rank_memory(model, Ranks(), 2065, free=40 * 10**9)
    require_rank_memory(model, Ranks(layout=Layout(ep=8)), 2065, free=40 * 10**9)
    with pytest.raises(InputError, match="of logits"):
        require_rank_memory(model, Ranks(layout=Layout(ep=8)), 131_072, free=40 * 10**9)


def test_missing_values_are_no_result(tmp_path: Path) -> None:
    """A rank that wrote nothing would leave zeros."""
    scores = ScoreFolder.create(tmp_path / "scores", {"logits": (1, 2, 3)})
    scores.write("logits", 0, [1], torch.ones(1, 3))
    scores.finish(0)
    with pytest.raises(RuntimeError, match="3 of 6 values"):
        scores.arrays()
    other = ScoreFolder(tmp_path / "scores")
    other.write("logits", 0, [0], torch.tensor([[7.0, 8.0]]), first_column=1)
    other.write("logits", 0, [0], torch.tensor([[6.0]]))
    other.finish(1)
    assert scores.arrays()["logits"].tolist() == [[[6.0, 7.0, 8.0], [1.0, 1.0, 1.0]]]
