"""Rules of reinforcement learning: one message each, before a process starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import apply_overrides
from mellum2_megatron.planning.rules import check
from mellum2_megatron.recipes import recipe

RUN = "mellum2_tiny_rlvr_instruct"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rl.objective.prompts=4"], r"prompts \* group_size = 32 answers"),
        (["rl.objective.max_tokens=256"], "max_tokens=256 with data.sequence_length=256"),
        (["loss.per_token=false"], "a mean over tokens"),
        (["data.workers=2"], "made in the rank itself"),
        (["logging.eval_iterations=2"], "rl.eval_answers"),
        (["loss.head_chunk=2048"], "a gradient of its own"),
        (["stability.spike=record"], "around 0"),
        (["data.document_attention=true"], "a sequence of its own"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], message: str) -> None:
    run = apply_overrides(recipe(RUN), words)
    with pytest.raises(InputError, match=message):
        raise next(one.problem for one in check(run, 2, "cpu", machine=False))


def test_settings_without_rollouts_are_refused() -> None:
    run = apply_overrides(recipe("mellum2_tiny_pretrain"), ["rl.rounds=2"])
    (found,) = check(run, 2, "cpu", machine=False)
    assert "would ignore them" in str(found.problem)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rl.objective.group_size=1", "a group has 2 or more"),
        ("rl.objective.band_low=2", "rl.objective.band_low"),
        ("rl.objective.band_high=0.5", "band_low <= 1 <= band_high"),
        ("rl.ahead=3", r"older than rl.objective.max_age \(2\)"),
        ("rl.engine=vllm", "rl.engine=vllm without rl.url or rl.server_python"),
        ("rl.url=http://127.0.0.1:8000", "runs inside each rank"),
        ("rl.server_python=python", "runs inside each rank"),
        ("rl.hand_over=restart", "runs inside each rank"),
        ("rl.engine=vllm rl.url=http://h:1 rl.server_python=p", "leave out one of them"),
        ("rl.engine=vllm rl.url=http://h:1 rl.hand_over=restart", "restart a server that it has"),
        ("rl.engine=vllm rl.server_python=p rl.hand_over=again", "rl.hand_over"),
        ("rl.rounds=0", "rl.rounds"),
        ("rl.objektive.prompts=3", "rl.objective"),
    ],
)
def test_values_out_of_range(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_overrides(recipe(RUN), word.split())


def test_a_server_without_vllm_is_refused(tmp_path: Path) -> None:
    for python, said in ((tmp_path / "python", "no Python that starts"), (sys.executable, "lacks")):
        run = apply_overrides(recipe(RUN), ["rl.engine=vllm", f"rl.server_python={python}"])
        problems = [str(one.problem) for one in check(run, 2, "cpu")]
        (found,) = [text for text in problems if text.startswith("rl.server_python")]
        assert said in found
        assert "make setup-serve" in found
