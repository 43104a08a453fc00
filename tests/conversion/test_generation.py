"""Generation against a plain greedy loop, and draft counts of the MTP head counted by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.huggingface.generation import Generation, generate, mtp_acceptance
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.tokens.tokenizer import train_tokenizer
from tests.conversion.folders import load_tensors, save_tensors, write_folder
from tests.small import python_like

VOCAB = 320
PROMPT = "def layer(self):\n    return "


def make_folder(path: Path, **changes: Any) -> Path:
    """A random model in the released layout, with a tokenizer."""
    write_folder(path, {"vocab_size": VOCAB, **changes}, dtype=torch.float32)
    train_tokenizer(map(python_like, range(20)), path, vocab_size=VOCAB)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def agreeing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that continues token i with i + 1, and whose MTP head drafts the same.

    Embeddings are one-hot, attention and experts add nothing, and the head reads i as i + 1. The
    MTP head passes on the embedding of the token it is fed and ignores the hidden state.
    """
    path = make_folder(tmp_path_factory.mktemp("agreeing") / "model", hidden_size=VOCAB)
    tensors = load_tensors(path)
    eye = torch.eye(VOCAB)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        elif "norm" in name:
            tensor.fill_(1.0)
    tensors["model.embed_tokens.weight"].copy_(eye)
    tensors["lm_head.weight"].copy_(eye.roll(1, dims=0))
    tensors["mtp.fc.weight"].copy_(torch.cat([eye, torch.zeros(VOCAB, VOCAB)], dim=1))
    save_tensors(path, tensors)
    return path


def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """Continue `ids` greedily: one full forward pass per token, no cache, no generate()."""
    from transformers import MellumForCausalLM

    model = MellumForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("use_mtp", [False, True])
def test_greedy_text_is_that_of_a_plain_loop(folder: Path, use_mtp: bool) -> None:
    result = generate(folder, PROMPT, use_mtp=use_mtp, max_new_tokens=24)
    plain = greedy(folder, list(result.prompt_ids), 24)
    expected = (
        plain[: plain.index(1, len(result.prompt_ids)) + 1]
        if 1 in plain[len(result.prompt_ids) :]
        else plain
    )
    assert [*result.prompt_ids, *result.token_ids] == expected
    assert result.text == PROMPT + result.completion
    assert "<|" not in result.completion
    assert (result.drafted is None) == (not use_mtp)


def test_every_draft_of_an_agreeing_head_is_accepted(agreeing: Path) -> None:
    result = generate(agreeing, "e", use_mtp=True, max_new_tokens=21)
    (first,) = result.prompt_ids
    assert result.token_ids == tuple(range(first + 1, first + 22))
    # One token from the first step, then two a step: ten drafts, all kept.
    assert (result.drafted, result.accepted) == (10, 10)
    assert result.acceptance_rate == 1.0
    assert result.acceptance_line() == "MTP: 10 of 10 drafted tokens accepted (100.0%)"
    assert generate(agreeing, "e", max_new_tokens=21).token_ids == result.token_ids


def test_no_draft_of_a_head_that_is_wrong_is_accepted(agreeing: Path, tmp_path: Path) -> None:
    wrong = shutil.copytree(agreeing, tmp_path / "wrong")
    tensors = load_tensors(wrong)
    tensors["mtp.fc.weight"].copy_(tensors["mtp.fc.weight"].roll(5, dims=0))
    save_tensors(wrong, tensors)
    result = generate(wrong, "e", use_mtp=True, max_new_tokens=21)
    assert result.token_ids == generate(agreeing, "e", max_new_tokens=21).token_ids
    assert (result.drafted, result.accepted, result.acceptance_rate) == (20, 0, 0.0)
    assert mtp_acceptance(wrong, torch.arange(100, 130)[None]) == 0.0
    assert mtp_acceptance(agreeing, torch.arange(100, 130)[None]) == 1.0


def test_acceptance_on_text_is_the_share_of_agreeing_positions(folder: Path) -> None:
    from transformers import MellumForCausalLM
    from transformers.modeling_layers import MtpModel

    tokens = torch.randint(11, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    main = MellumForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mtp = MtpModel.from_pretrained(main).eval()
    agree = 0
    with torch.no_grad():
        for row in tokens:
            for t in range(19):  # every position by itself, from a prefix that ends there
                hidden = main.model(row[None, : t + 1]).last_hidden_state
                positions = torch.arange(t + 1)[None]
                drafted = mtp.forward_layer(
                    0, hidden, positions, None, input_ids=row[None, 1 : t + 2]
                )
                confirmed = main(row[None, : t + 2]).logits[0, -1].argmax()
                agree += int(main.lm_head(drafted)[0, -1].argmax() == confirmed)
    assert mtp_acceptance(folder, tokens) == pytest.approx(agree / (3 * 19), abs=1e-7)


def test_a_head_of_a_layer_type_the_trunk_lacks_drafts_too(tmp_path: Path) -> None:
    changes = {"layer_types": ["full_attention"] * 3, "mtp_layer_types": ["sliding_attention"]}
    path = make_folder(tmp_path / "model", **changes)
    assert (
        generate(path, PROMPT, use_mtp=True, max_new_tokens=12).token_ids
        == generate(path, PROMPT, max_new_tokens=12).token_ids
    )


def test_samples_follow_the_seed_and_leave_the_global_generator_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    samples = [
        generate(
            folder, PROMPT, max_new_tokens=16, temperature=2.0, seed=seed, use_mtp=mtp
        ).token_ids
        for seed, mtp in ((1, False), (1, False), (2, False), (1, True), (1, True))
    ]
    assert samples[0] == samples[1] != samples[2]
    assert samples[3] == samples[4]
    assert torch.equal(torch.get_rng_state(), before)


def test_text_stops_after_the_end_token(agreeing: Path, tmp_path: Path) -> None:
    path = shutil.copytree(agreeing, tmp_path / "ends")
    config = json.loads((path / "config.json").read_text())
    result = generate(path, "e", max_new_tokens=30)
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": result.token_ids[6]}))
    for use_mtp in (False, True):
        assert (
            generate(path, "e", max_new_tokens=30, use_mtp=use_mtp).token_ids
            == result.token_ids[:7]
        )


def test_special_tokens_are_ids_and_not_text(agreeing: Path) -> None:
    from tokenizers import Tokenizer

    last = Tokenizer.from_file(str(agreeing / "tokenizer.json")).decode([VOCAB - 1])
    result = generate(agreeing, last, max_new_tokens=30)
    assert (result.prompt_ids, result.token_ids) == (
        (VOCAB - 1,),
        (0, 1),
    )  # counting on: start and end of text
    assert result.text == last


def test_invalid_requests_are_refused(folder: Path, tmp_path: Path) -> None:
    without = make_folder(tmp_path / "without", num_mtp_layers=None, mtp_layer_types=None)
    assert generate(without, PROMPT, max_new_tokens=3).drafted is None
    with pytest.raises(InputError, match="--use-mtp"):
        generate(without, PROMPT, use_mtp=True)
    with pytest.raises(InputError, match="no MTP head"):
        mtp_acceptance(without, torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(InputError, match="token to continue from"):
        generate(folder, "")
    with pytest.raises(InputError, match="max_position_embeddings=128"):
        generate(folder, PROMPT, max_new_tokens=128)
    with pytest.raises(InputError, match="max_new_tokens=0"):
        generate(folder, PROMPT, max_new_tokens=0)
    for temperature in (-1.0, 1e-9, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"temperature={temperature}"):
            generate(folder, PROMPT, temperature=temperature)
    with pytest.raises(InputError, match="two tokens a row"):
        mtp_acceptance(folder, torch.zeros(4, 1, dtype=torch.long))
    (without / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer.json"):
        generate(without, PROMPT)
    with pytest.raises(InputError, match="no such folder"):
        generate(tmp_path / "absent", PROMPT)


def test_rates_without_drafts() -> None:
    empty = Generation(
        prompt="a", completion="", prompt_ids=(1,), token_ids=(2,), drafted=0, accepted=0
    )
    assert empty.acceptance_rate is None
    assert "no token" in empty.acceptance_line()
