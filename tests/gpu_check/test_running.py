"""Which pieces of the GPU check run at a call, and the whole check rehearsed on a CPU."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.gpu_check import page, running
from mellum2_megatron.gpu_check.machine import rehearsal_facts
from mellum2_megatron.gpu_check.piece import LIMIT, Outcome, Piece, PieceError, Workplace
from tests import REPOSITORY
from tests.cli.runner import mellum2

Run = Callable[..., tuple[dict[str, Any], list[str]]]


class Fake:
    """Three pieces whose outcomes a test chooses; `ran` lists those that ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: set[str] = set()
        self.raises: Exception | None = None
        self.figures: dict[str, Any] = {}

    def run(self, place: Workplace, piece: str) -> Outcome:
        self.ran.append(piece)
        if piece in self.fails:
            raise self.raises or PieceError(f"{piece} broke")
        (place.work / piece).mkdir(parents=True, exist_ok=True)
        figures = self.figures if piece == "first" else {}
        return Outcome(status="passed", figures=figures, decides=(f"{piece} decides",))

    def pieces(self) -> tuple[Piece, ...]:
        def piece(name: str, **options: Any) -> Piece:
            run = functools.partial(self.run, piece=name)
            return Piece(name=name, title=f"{name}?", run=run, **options)

        return (
            piece("first", leaves="first", limit=60),
            piece("second", needs=("first",), limit=600),
            piece("memory", always=True, limit=10),
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    monkeypatch.setattr(running, "PIECES", found.pieces())
    # The page looks for the figures of the real pieces.
    monkeypatch.setattr("mellum2_megatron.gpu_check.page._differences", lambda rows: iter(()))
    return found


def check(output: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    return running.run_pieces(
        output, rehearsal_facts(), rehearsal=True, report=lambda line: None, **options
    )


def test_only_what_has_not_passed_runs_again(fake: Fake, tmp_path: Path) -> None:
    fake.fails = {"second"}
    folder, results = check(tmp_path)
    assert fake.ran == ["first", "second", "memory"]
    assert results["counts"] == {"passed": 2, "failed": 1, "skipped": 0, "not run": 0}
    assert "second broke" in (folder / "gpu_check.md").read_text()
    fake.ran, fake.fails = [], set()
    again, results = check(tmp_path)
    assert again == folder
    assert fake.ran == ["second", "memory"]
    assert results["counts"]["passed"] == 3
    assert results["decides"] == ["first decides", "second decides", "memory decides"]
    assert json.loads((folder / "gpu_check.json").read_text()) == results


def test_a_piece_runs_again_if_what_it_left_for_others_is_gone(fake: Fake, tmp_path: Path) -> None:
    folder, _ = check(tmp_path)
    shutil.rmtree(folder / "work")
    fake.ran = []
    check(tmp_path)
    assert fake.ran == ["first", "memory"]


def test_a_piece_without_what_it_needs_is_skipped(fake: Fake, tmp_path: Path) -> None:
    fake.fails = {"first"}
    _, results = check(tmp_path)
    assert results["pieces"]["second"]["status"] == "skipped"
    assert results["pieces"]["second"]["reason"] == "needs first, which has not passed"


def test_a_piece_with_a_bug_costs_neither_the_others_nor_the_page(
    fake: Fake, tmp_path: Path
) -> None:
    fake.fails, fake.raises = {"first"}, KeyError("median_seconds")
    folder, results = check(tmp_path)
    assert results["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "not run": 0}
    reason = results["pieces"]["first"]["reason"]
    file = folder / "logs" / "first.traceback"
    assert reason == f"KeyError: 'median_seconds' (see {file})"
    assert "in run" in file.read_text()
    assert "KeyError" in (folder / "gpu_check.md").read_text()


def test_figures_that_are_not_numbers_are_kept(fake: Fake, tmp_path: Path) -> None:
    """Logits that are NaN must not make a result that no later call can read."""
    fake.figures = {"te in BF16": {"logits": float("nan"), "steps": (1.0, float("inf"))}}
    check(tmp_path)
    _, results = check(tmp_path)
    figures = results["pieces"]["first"]["figures"]
    assert figures == {"te in BF16": {"logits": None, "steps": [1.0, None]}}


def test_the_page_shows_what_is_not_finite() -> None:
    rows: dict[str, Any] = {
        name: {} for name in ("resume", "deterministic", "backends", "fp8", "logits")
    }
    rows["logits"] = {"figures": {"te in BF16": {"logits": None, "mtp_logits": 0.012}}}
    shown = "\n".join(page._differences(rows))
    assert "| logits | te in BF16: logits | not finite |" in shown
    assert "| logits | te in BF16: mtp_logits | 0.012 |" in shown


def test_named_pieces_run_again_and_no_others(fake: Fake, tmp_path: Path) -> None:
    check(tmp_path)
    fake.ran = []
    check(tmp_path, only=["second"])
    assert fake.ran == ["second", "memory"]


def test_no_piece_begins_that_may_end_too_late(fake: Fake, tmp_path: Path) -> None:
    _, results = check(tmp_path, minutes=5)
    assert fake.ran == ["first", "memory"]
    assert results["pieces"]["second"]["status"] == "not run"
    fake.ran = []
    _, results = check(tmp_path, minutes=11)
    assert fake.ran == ["second", "memory"]
    assert results["counts"]["not run"] == 0


def test_results_belong_to_a_machine_and_to_code(tmp_path: Path) -> None:
    code = tmp_path / "mellum2_megatron" / "file.py"
    code.parent.mkdir()
    code.write_text("a = 1\n")
    gpu = {"name": "NVIDIA H100 80GB", "memory_bytes": 1, "capability": [9, 0]}

    def name(gpus: int = 1, rehearsal: bool = False) -> str:
        return running.folder_name({"gpus": [gpu] * gpus}, tmp_path, rehearsal=rehearsal)

    first = name()
    assert first.startswith("1x_nvidia_h100_80gb_")
    assert name() == first
    assert len({first, name(gpus=2), name(rehearsal=True)}) == 3
    code.write_text("a = 2\n")
    assert name() != first


def test_pieces_are_named_once_and_take_at_most_ten_minutes() -> None:
    names = [piece.name for piece in running.PIECES]
    assert len(names) == len(set(names))
    for number, piece in enumerate(running.PIECES):
        # `--minutes 10` must leave some seconds before it, or the piece would never begin.
        assert piece.limit <= LIMIT - 30
        assert set(piece.needs) <= set(names[:number])


def test_without_a_gpu_or_with_an_unknown_piece_the_command_is_refused() -> None:
    refused = mellum2("gpu-check")
    assert refused.code == 2
    assert "rehearse it with --device cpu" in refused.err
    unknown = mellum2("gpu-check", "--device", "cpu", "--only", "layouts_7")
    assert unknown.code == 2
    assert "did you mean 'layouts_" in unknown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "9"], "layouts_1 may take 9 minutes, and would never begin"),
        (["--minutes", "4", "--only", "train"], "use --minutes 5"),
        (["--minutes", "8", "--only", "train", "--only", "fp8"], "use --minutes 9"),
        (["--output", __file__], "is a file"),
    ],
)
def test_a_call_in_which_a_piece_would_never_begin_is_refused(
    words: list[str], message: str
) -> None:
    """Such a call would end with 75, or 0, for ever."""
    refused = mellum2("gpu-check", "--device", "cpu", *words)
    assert refused.code == 2
    assert message in refused.err
    running.check_minutes(10, [])
    running.check_minutes(5, ["train"])


def rehearse(output: Path) -> subprocess.CompletedProcess[str]:
    words = ["gpu-check", "--device", "cpu", "--output", str(output)]
    return subprocess.run(
        [sys.executable, "-m", "mellum2_megatron", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_check_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    done = rehearse(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    results = json.loads((folder / "gpu_check.json").read_text())
    status = {name: row["status"] for name, row in results["pieces"].items()}
    skipped = {name for name in status if status[name] == "skipped"}
    assert skipped == {
        *("backends", "fp8", *(f"layouts_{part}" for part in range(2, 7))),
        *("speed_padding", "speed_heads", "speed_recompute", "speed_norm"),
        "speed_deterministic",
        *("speed_overlap", "speed_wgrad", "speed_dispatcher"),
    }
    assert set(status.values()) == {"passed", "skipped"}, results["pieces"]
    figures = {name: row["figures"] for name, row in results["pieces"].items()}
    # On a CPU a resumed run repeats every bit.
    assert set(figures["resume"]["largest relative difference"].values()) == {0.0}
    assert set(figures["deterministic"]["run again"].values()) == {0.0}
    assert len(figures["deterministic"]["run again"]) == 6
    assert set(figures["train"]["losses"]) == {"1", "2", "3", "4"}
    assert figures["layouts_1"] == {"passed": ["gloo-ep2"]}
    # BF16 has 8 bits.
    assert 1e-4 < figures["logits"]["torch in BF16"]["logits"] < 0.1
    assert figures["export"]["verify"]
    arms = figures["speed_precision"]["arms"]
    assert set(arms) == {"optimizer.name=muon", "optimizer.name=adam"}
    assert all(arm["seconds a step"] > 0 for arm in arms.values())
    assert len(figures["memory"]) == 2
    # It decides nothing, and says so.
    assert results["decides"] == []
    page = (folder / "gpu_check.md").read_text()
    assert "No figure means anything for a GPU" in page
    for part in ("Speed of a training step", "Time of a step by part", "Memory", "Differences"):
        assert f"## {part}" in page
    assert "| fp8 | Has FP8 the losses and gradient norms of BF16? | skipped |" in page
    # What has passed is kept.
    logs = {path: path.stat().st_mtime_ns for path in (folder / "logs").iterdir()}
    again = rehearse(tmp_path)
    assert again.returncode == 0
    assert "running train" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / "logs").iterdir()} == logs
