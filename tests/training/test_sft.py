"""The four commands of docs/sft.md, run as they stand with a small model in place of the 12B."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from mellum2_megatron.data.chat.template import our_template
from tests import REPOSITORY
from tests.cli.runner import mellum2
from tests.conversion.releases import write_model
from tests.data.chats import turn, write_rows
from tests.forked_ranks import fork_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BASE = "Mellum2-12B-Base"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
SMALL = [
    f"architecture={BASE}",
    "data.sequence_length=256",
    "layout.ep=1",
    "schedule.batch_schedule=[[0,2]]",
    "schedule.warmup_samples=8",
    "optimizer.lr=5e-3",
    "optimizer.min_lr=5e-4",
    "logging.eval_iterations=1",
]
"""What the small model needs besides the page's own words."""


def page_commands() -> list[list[str]]:
    """Return the words of each command in the page's first block."""
    text = (REPOSITORY / "docs" / "sft.md").read_text(encoding="utf-8")
    block = re.search(r"```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    lines = block[1].replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line) for line in lines]


def test_the_page_leads_to_a_model_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fork_ranks(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_model(
        tmp_path / BASE,
        hidden_size=32,
        num_experts=4,
        max_position_embeddings=512,
        rope_parameters={"full_attention": YARN, "sliding_attention": ROPE},
    )
    rows = [
        {"messages": [turn("user", f"{i}?"), turn("assistant", "pong", reasoning=f"{i}")]}
        for i in range(60)
    ]
    write_rows(tmp_path / "chats.jsonl", rows)
    imported, chat, train, released = page_commands()
    chat += ["--length", "256", "--workers", "1"]
    train = [word.replace("12b_sft", "tiny_sft") for word in train]
    train = [word for word in train if not word.startswith("schedule.")]
    for words in (imported, chat, [*train, *SMALL, "schedule.train_samples=64"], released):
        assert words[0] == "mellum2"
        done = mellum2(*words[1:])
        assert done.code == 0, (words, done)
    folder = tmp_path / "out" / "my-mellum2"
    report = json.loads((folder / "verification.json").read_text())
    assert {check["status"] for check in report["checks"]} <= {"pass", "not applicable"}
    assert (folder / "chat_template.jinja").read_text() == our_template()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    prompt = tokenizer.apply_chat_template(
        [turn("user", "7?")], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].size(1) :])
    # It ends by itself, at the token that was learnt.
    assert text == "pong<|im_end|>"
