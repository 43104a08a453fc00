"""The model that measures ask, against transformers' own whole forward pass and generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MellumForCausalLM

from conversion.huggingface.evaluated_model import TransformersModel


@pytest.fixture(scope="module")
def model(chat_model: Path) -> TransformersModel:
    return TransformersModel(chat_model)


@pytest.fixture(scope="module")
def plain(chat_model: Path) -> MellumForCausalLM:
    return MellumForCausalLM.from_pretrained(chat_model, dtype=torch.float32).eval()


@torch.no_grad()
def reference(plain: MellumForCausalLM, row: list[int]) -> torch.Tensor:
    """Log-probabilities `[s - 1, v]` of a whole row."""
    return torch.log_softmax(plain(input_ids=torch.tensor([row])).logits[0, :-1].float(), -1)


# More positions than a block of logits, which is made small here.
def test_log_probabilities(
    model: TransformersModel, plain: MellumForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conversion.huggingface.evaluated_model._BLOCK", 7)
    tokens = torch.randint(10, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    found = model.log_probabilities(tokens)
    assert found.shape == (2, 39)
    assert found.dtype == torch.float32
    for row, values in zip(tokens.tolist(), found, strict=True):
        table = reference(plain, row)
        wanted = torch.stack([table[t, token] for t, token in enumerate(row[1:])])
        torch.testing.assert_close(values, wanted, rtol=0, atol=1e-5)


# The prompt is longer than the window: sliding layers keep a part of it.
def test_continuations_of_one_prompt(model: TransformersModel, plain: MellumForCausalLM) -> None:
    prompt = list(range(20, 50))
    greedy = model.continue_greedily(prompt, max_new_tokens=4)
    choices = [[33], [33, 44, 55], greedy]
    results = model.score_continuations(prompt, choices)
    for continuation, result in zip(choices, results, strict=True):
        table = reference(plain, prompt + continuation)[len(prompt) - 1 :]
        wanted = sum(float(table[t, token]) for t, token in enumerate(continuation))
        assert result.log_probability == pytest.approx(wanted, abs=1e-4)
        assert result.is_greedy == (table.argmax(-1).tolist() == continuation)
    assert results[2].is_greedy


def test_greedy_text(model: TransformersModel, plain: MellumForCausalLM) -> None:
    prompt = list(range(20, 50))
    wanted = plain.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    assert model.continue_greedily(prompt, max_new_tokens=8) == wanted
    stop = wanted[3]
    end = wanted.index(stop) + 1
    assert model.continue_greedily(prompt, max_new_tokens=8, stop=[stop]) == wanted[:end]


def test_special_tokens_in_texts_are_ordinary_text(model: TransformersModel) -> None:
    ids = model.encode("<|endoftext|>x")
    assert model.architecture.eos_token_id not in ids
    assert model.decode(ids) == "<|endoftext|>x"
