"""Rules of reinforcement learning: one message each, before a process starts."""

from __future__ import annotations

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
        ("rl.engine=vllm", "rl.engine=vllm without rl.url"),
        ("rl.url=http://127.0.0.1:8000", "runs inside each rank"),
        ("rl.rounds=0", "rl.rounds"),
        ("rl.objektive.prompts=3", "rl.objective"),
    ],
)
def test_values_out_of_range(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_overrides(recipe(RUN), [word])
