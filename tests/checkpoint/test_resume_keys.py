"""Settings that a resume keeps, records or takes as they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mellum2_megatron.checkpoint import StartingPoint, read_run, write_run_folder
from mellum2_megatron.checkpoint.data_record import DataRecord
from mellum2_megatron.checkpoint.folder import how_to_resume
from mellum2_megatron.checkpoint.resume_keys import RULES, changes, rule_of
from mellum2_megatron.checkpoint.run_folder import history_file, read_run_in_place
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.provenance import read_records
from mellum2_megatron.config import Run, Schedule, keys, to_yaml
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.metrics import read_metrics
from mellum2_megatron.metrics.log import METRICS_FILE
from mellum2_megatron.planning.resume import rate_jump
from mellum2_megatron.planning.rules import check
from tests.checkpoint.test_continuation import check_folder, folder_of, tiny
from tests.training.test_train import losses, small_run, train

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
LENGTHS = ["schedule.warmup_samples=8", "schedule.decay_samples=16"]
EIGHT = [*LENGTHS, "schedule.batch_schedule=[[0,8]]"]


def test_every_key_of_a_run_has_exactly_one_class() -> None:
    known = keys()
    missing = [key for key in known if key not in RULES and key.partition(".")[0] != "architecture"]
    assert missing == []
    assert [key for key in RULES if key not in known] == ["architecture"]


def test_the_page_has_the_class_of_every_key() -> None:
    rows = [line.strip("| ").split(" | ") for line in DOCS.read_text().splitlines() if "`" in line]
    listed = {key.strip("`"): row[0] for row in rows if len(row) == 2 for key in row[1].split(", ")}
    assert {key: rule.resume for key, rule in RULES.items()} == {
        key: kind for key, kind in listed.items() if key in RULES
    }


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.weight_decay=0.3", "optimizer.weight_decay: 0.1 -> 0.3"),
        ("loss.aux_loss_coef=0.1", "loss.aux_loss_coef: 0.001 -> 0.1"),
        ("data.train=[[1,a/b],[2,c/d]]", "data.train: [] -> [[1.0, 'a/b'], [2.0, 'c/d']]"),
        ("seed=7", "seed: 1234 -> 7"),
        ("architecture.rms_norm_eps=1e-5", "architecture.rms_norm_eps: 1e-06 -> 1e-05"),
        ("logging.log_interval=3", None),
        ("data.workers=0", None),
        ("checkpoint.load=gone", None),
    ],
    ids=lambda value: str(value).split("=")[0].replace(" ", "_"),
)
def test_changes_name_old_and_new_value(override: str, line: str | None) -> None:
    found = [change.line() for change in changes(tiny(), tiny(override), phase=False)]
    assert found == ([] if line is None else [line])


def test_sequence_length_is_a_phases_own() -> None:
    kinds = [
        changes(tiny(), tiny("data.sequence_length=32"), phase=phase)[0].kind
        for phase in (False, True)
    ]
    assert kinds == ["fixed", "recorded"]
    assert rule_of("optimizer.lr").phase == "fixed"


def broken(run: Run) -> dict[str, str]:
    return {
        entry.rule.name: str(entry.problem)
        for entry in check(run, 2, "cpu")
        if entry.rule.name.startswith("resume-")
    }


def test_samples_of_another_length_are_refused(tmp_path: Path) -> None:
    root = folder_of(tiny(), tmp_path / "run", step=100)
    run = tiny(f"checkpoint.output={root}", "data.sequence_length=32")
    assert "data.sequence_length=32" in broken(run)["resume-keeps-settings"]


# -- Batches and steps


def test_steps_left_follow_from_the_samples_left(tmp_path: Path) -> None:
    before = tiny(*EIGHT, "schedule.train_samples=64")
    root = folder_of(before, tmp_path / "run", step=8)
    words = [f"checkpoint.output={root}", *LENGTHS, "schedule.train_samples=96"]
    run = tiny(*words, "schedule.batch_schedule=[[0,16]]")
    start = StartingPoint.of(run)
    joined = start.joined(run)
    assert joined.schedule.batch_schedule == ((0, 8), (64, 16))
    assert (joined.schedule.train_steps, joined.schedule.samples(8)) == (10, 64)
    assert start.joined(joined) == joined
    # The steps that a plain count gives: 8 of 8 sequences, then 32 samples in steps of 16.
    assert joined.schedule.train_steps == 64 // 8 + 32 // 16
    # The same command again, two steps later.
    folder_of(joined, tmp_path / "later", step=10)
    assert StartingPoint.of(tiny(f"checkpoint.output={tmp_path / 'later'}")).joined(run) == joined


@pytest.mark.parametrize(
    ("done", "asked", "reached", "joined"),
    [
        ([[0, 8]], [[0, 8]], 24, [[0, 8]]),
        ([[0, 8], [16, 16]], [[0, 8]], 8, [[0, 8]]),
        ([[0, 8], [16, 16]], [[0, 8]], 32, [[0, 8], [16, 16], [32, 8]]),
        ([[0, 8]], [[0, 4], [48, 16]], 32, [[0, 8], [32, 4], [48, 16]]),
        ([[0, 4], [8, 8]], [[0, 4], [8, 8], [40, 4]], 24, [[0, 4], [8, 8], [40, 4]]),
    ],
    ids=["same", "dropped", "back", "ramp", "explicit"],
)
def test_batches_done_stay(
    done: list[list[int]], asked: list[list[int]], reached: int, joined: list[list[int]]
) -> None:
    old, new = (
        Schedule(train_samples=96, batch_schedule=tuple((a, b) for a, b in pairs))
        for pairs in (done, asked)
    )
    assert [list(pair) for pair in new.after(old, reached).batch_schedule] == joined


def test_an_end_between_two_steps_names_a_schedule_that_works() -> None:
    old = Schedule(train_samples=64, batch_schedule=((0, 8),))
    new = Schedule(train_samples=64, batch_schedule=((0, 16),))
    with pytest.raises(InputError, match=r"use 56 or 72, with .*=\[\[0,8\],\[24,16\]\]"):
        new.after(old, 24)
    with pytest.raises(InputError, match="has 128 samples already"):
        new.after(Schedule(train_samples=128, batch_schedule=((0, 8),)), 128)


def test_an_end_before_the_checkpoint_is_a_broken_rule(tmp_path: Path) -> None:
    root = folder_of(tiny(*EIGHT, "schedule.train_samples=64"), tmp_path / "run", step=8)
    for samples, refused in ((56, True), (64, False)):
        run = tiny(f"checkpoint.output={root}", *EIGHT, f"schedule.train_samples={samples}")
        assert ("resume-ends-on-a-step" in broken(run)) is refused


# -- Learning rate


@pytest.mark.parametrize(
    ("step", "change", "jumps"),
    [
        (8, [], False),
        (8, ["schedule.train_samples=96"], True),
        (8, ["schedule.train_samples=96", "schedule.decay_samples=48"], True),
        (8, ["schedule.train_samples=96", "schedule.rewarm_at=64"], False),
        (8, ["schedule.train_samples=96", "schedule.rewarm_at=56"], True),
        (8, ["schedule.train_samples=96", "schedule.decay_samples=80"], False),
        (4, ["schedule.train_samples=96"], False),
        (7, ["schedule.train_samples=96"], False),
        (4, ["schedule.warmup_samples=40", "schedule.train_samples=96"], False),
        (1, ["schedule.warmup_samples=16"], False),
    ],
)
def test_a_rate_rises_only_if_told(
    tmp_path: Path, step: int, change: list[str], jumps: bool
) -> None:
    before = tiny(*EIGHT, "schedule.train_samples=64")
    root = folder_of(before, tmp_path / "run", step=step)
    run = tiny(f"checkpoint.output={root}", *EIGHT, "schedule.train_samples=64", *change)
    message = broken(run).get("resume-keeps-rate-down", "")
    assert bool(message) is jumps
    if jumps:
        assert "schedule.rewarm_at=64" in message
        assert "from 0.001 (last step" in message
    # Independent: the rates of all steps to come against those of the former schedule.
    start, told = StartingPoint.of(run), run.schedule.rewarm_at == 64
    ahead = [run.learning_rate(sample) for sample in range(8 * step, run.schedule.train_samples, 8)]
    former = [before.learning_rate(sample) for sample in range(8 * (step - 1), 64, 8)]
    assert (rate_jump(run, start) is not None) is (max(ahead, default=0) > max(former))
    assert jumps is (max(ahead, default=0) > max(former) and not told)


# -- Folders


def test_the_former_run_file_is_kept(small_data: PreparedData, tmp_path: Path) -> None:
    root = tmp_path / "run"
    before = small_run(small_data, root)
    folder_of(before, root, step=3)
    write_run_folder(before)
    assert not history_file(root, 3).exists()
    after = small_run(small_data, root, "optimizer.weight_decay=0.3")
    write_run_folder(after)
    write_run_folder(after)  # the launcher and rank 0 both do
    assert history_file(root, 3).read_text() == to_yaml(before)
    assert read_run(root / "run.yaml") == after
    # The run that made the checkpoint, although run.yaml is another by now.
    assert StartingPoint.of(after).before == before


def test_a_moved_folder_is_the_folder_of_its_run_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = folder_of(tiny("checkpoint.output=base"), tmp_path / "base", step=3)
    assert read_run_in_place(Path("base/run.yaml"))[1] == ""
    root.rename(tmp_path / "moved")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "moved" / "run.yaml").write_text(
        to_yaml(tiny("checkpoint.output=base", "data.path=corpus"))
    )
    (tmp_path / "moved" / "provenance.jsonl").write_text(f'{{"cwd": "{tmp_path}"}}\n')
    run, note = read_run_in_place(Path("moved/run.yaml"))
    assert (run.checkpoint.output, run.data.path) == ("moved", "corpus")
    assert "the run folder is moved, not base" in note
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run, _ = read_run_in_place(Path("../moved/run.yaml"))
    assert (run.checkpoint.output, run.data.path) == ("../moved", str(tmp_path / "corpus"))
    # A file of the user's own, in no run folder, is taken as it stands.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.yaml").write_text(to_yaml(tiny("checkpoint.output=base")))
    assert read_run_in_place(tmp_path / "mine" / "run.yaml")[0].checkpoint.output == "base"


def test_a_resume_does_not_need_its_origin(small_data: PreparedData, tmp_path: Path) -> None:
    for origin in ("load", "continue_from"):
        run = small_run(small_data, tmp_path / origin, f"checkpoint.{origin}=/gone")
        folder_of(run, tmp_path / origin, step=3)
        check_folder(run)


def test_another_tokenizer_is_fixed_other_tokens_are_recorded() -> None:
    record = DataRecord(train=("a",), valid=("b",), tokenizer="t" * 64)
    other = dataclasses.replace(record, train=("c",), tokenizer="u" * 64)
    assert [(change.kind, change.before) for change in record.changes(other)] == [
        ("fixed", "t" * 12),
        ("recorded", "a"),
    ]
    assert record.changes(record) == ()


def test_messages_promise_a_resume_only_with_a_checkpoint(tmp_path: Path) -> None:
    assert "no checkpoint was saved" in how_to_resume(tmp_path)
    folder_of(tiny(), tmp_path / "run", step=3)
    assert how_to_resume(tmp_path / "run") == "the same command resumes from the last checkpoint"


@pytest.mark.slow
@pytest.mark.distributed
def test_another_batch_trains_the_samples_left(small_data: PreparedData, tmp_path: Path) -> None:
    """A resume with a new batch has the losses of a run that changed it there by its schedule."""
    words = ["schedule.train_samples=40", "logging.eval_iterations=0"]
    whole = train(
        small_run(small_data, tmp_path / "whole", "schedule.batch_schedule=[[0,4],[24,8]]", *words),
        nproc=2,
    )
    root = tmp_path / "resumed"
    fours = ["schedule.batch_schedule=[[0,4]]", "schedule.horizon_samples=40"]
    by_fours = small_run(small_data, root, *words, *fours, "schedule.train_samples=24")
    train(by_fours, nproc=2)
    eights = ["schedule.batch_schedule=[[0,8]]", "schedule.horizon_samples=40"]
    resumed = train(small_run(small_data, root, *words, *eights), nproc=2)
    assert losses(resumed) == losses(whole)
    assert losses(resumed, "samples") == {n: 4 * n for n in range(1, 7)} | {7: 32, 8: 40}
    notes = [record.note for record in read_metrics(resumed / METRICS_FILE) if record.note]
    assert any(note.startswith("changed: schedule.batch_schedule: [[0, 4]]") for note in notes)
    changed = [line["changed"] for line in read_records(resumed) if line["event"] == "start"][-1]
    assert changed == {
        "schedule.train_samples": [24, 40],
        "schedule.batch_schedule": [[[0, 4]], [[0, 4], [24, 8]]],
    }
    assert history_file(resumed, 6).read_text() == to_yaml(by_fours)
