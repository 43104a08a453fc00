"""`mellum2 quickstart --chat` from text to a released chat model, with few steps each."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launchers.quickstart_chat import QUESTION, ChatQuickstart
from launchers.steps import Steps
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.common.errors import InputError
from tests.cli.runner import mellum2, snapshot
from tests.forked_ranks import fork_ranks

BASE = [
    "schedule.batch_schedule=[[0,4]]",
    "schedule.micro_batch_size=2",
    "schedule.train_samples=8",
    "schedule.warmup_samples=4",
    "schedule.decay_samples=4",
    "logging.eval_interval=1",
    "logging.eval_iterations=1",
]
LONG = ["schedule.train_samples=2", "schedule.warmup_samples=0", "schedule.decay_samples=0",
        "logging.eval_iterations=1"]  # fmt: skip
SFT = ["schedule.train_samples=8", "schedule.warmup_samples=0", "logging.eval_iterations=1"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the steps here, all but one, and fork their ranks: each process imports for seconds."""
    start_process = Steps.run

    def run(self: Steps, name: str, purpose: str, *words: str) -> None:
        if name == "questions":
            start_process(self, name, purpose, *words)
            return
        self.announce(name, purpose, *words)
        start = time.monotonic()
        done = mellum2(*words)
        assert done.code == 0, (words, done)
        self.seconds[name] = time.monotonic() - start

    monkeypatch.setattr(Steps, "run", run)
    fork_ranks(monkeypatch)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("in_this_process")
def test_from_text_to_a_released_chat_model_and_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A second walk trains nothing again, and refuses words that it could not follow."""
    base, data, output = tmp_path / "base", tmp_path / "data", tmp_path / "chat"
    # Fewer megabytes of installed files may leave the validation split empty.
    walk = ChatQuickstart(base, data, output, BASE, LONG, SFT, 8.0, conversations=60)
    summary = walk.run()
    assert set(walk.steps.seconds) >= {"prepare", "train", "long context", "sft", "release", "ask"}
    for figures in (summary["before"], summary["after"]):
        assert set(figures) == {"loss", "ended", "in form", "right"}
        assert figures["loss"]["items"] > 1
    # Fine-tuning ran on what was measured, from the weights that were measured before.
    assert summary["after"]["loss"]["value"] < summary["before"]["loss"]["value"]
    assert read_run(output / "sft/run.yaml").checkpoint.load == str(output / "long_context")
    assert (output / "release/chat_template.jinja").is_file()
    assert json.loads((output / "summary.json").read_text())["question"] == QUESTION
    assert "fine-tuning" in capfd.readouterr().out

    with pytest.raises(InputError, match=r"seed=2: .*base has been trained already"):
        ChatQuickstart(base, data, output, ["seed=2"]).run()
    trained = snapshot(output / "sft")
    again = ChatQuickstart(base, data, output, (), LONG, SFT, 8.0, conversations=60)
    assert again.run()["after"] == summary["after"]
    # The two trainings find nothing to do, and the rest takes seconds.
    assert set(again.steps.seconds) == {"long context", "before", "sft", "after", "release", "ask"}
    assert trained.items() <= snapshot(output / "sft").items()


def test_words_for_a_base_that_is_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text("{}")
    mellum2("quickstart", "--chat", "--output", tmp_path / "run", "seed=3").refused(
        "seed=3", "has been trained already"
    )
