"""Reports of a made-up study: what they show, and what is missing from them."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from ablations.answering.comparison import Comparison
from ablations.answering.report import write_report
from ablations.answering.tables import ratio
from ablations.asking.study import Arm, Metric
from ablations.running.evaluations import evaluate_tasks
from ablations.running.results import task_folder
from ablations.running.statement import Statement, read_statement, state
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import apply_overrides
from tests.ablations.study_files import (
    DOCUMENTS,
    EFFECT,
    NAME,
    STEPS,
    STUDY,
    compared,
    sums_of,
    tasks,
    write_study,
    write_task,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    write_study(folder)
    return folder


@pytest.fixture(scope="module")
def comparison(results: Path) -> Comparison:
    return compared(results)


def rewritten(results: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(results, tmp_path / "results"))


def test_answers(comparison: Comparison) -> None:
    answers = {one.arm: one for one in comparison.answers["valid_loss"]}
    assert list(answers) == ["with", "flat"]
    assert answers["with"].word == "better"
    assert answers["with"].difference == pytest.approx(EFFECT["with"], abs=0.01)
    # The seeds' own level, of ten times the noise, is in both arms.
    assert answers["with"].sd < 0.005
    assert answers["flat"].word == "no difference larger than delta"
    assert comparison.answers["step_seconds"][0].word == "worse"
    assert comparison.notes == ()


def test_figures_of_a_run(comparison: Comparison) -> None:
    run = comparison.of_arm("with")[0]
    assert run.sums is not None
    value = comparison.figures["valid_loss"]["with"][1]
    assert value == pytest.approx(run.sums.nats.sum() / run.sums.tokens.sum())
    bits = comparison.figures["valid_bits_per_byte"]["with"][1]
    assert bits == pytest.approx(value / np.log(2) / 3)
    assert run.values["train_loss"] == pytest.approx(6 / STEPS + EFFECT["with"] + 0.1)
    assert run.values["expert_load"] == 1.5
    assert run.values["spikes"] == 1
    # All tokens of these sums are in the last bucket, the last quarter of a sequence.
    assert run.values["loss_late"] == pytest.approx(value)
    assert "loss_early" in run.missing
    assert "fim_exact_match" in run.missing
    assert run.values["mtp_loss"] == pytest.approx(7 / STEPS)
    assert "mtp_loss" in comparison.of_arm("without")[0].missing
    assert run.commit == "0123456789"
    assert run.curve("lm_loss")[0][-1] == 80 * run.run.data.sequence_length


def test_ratios(comparison: Comparison) -> None:
    assert ratio(comparison, "with", "step_seconds") == pytest.approx(2)
    assert ratio(comparison, "flat", "tokens_per_second") == pytest.approx(1)
    assert ratio(comparison, "with", "needle") is None


def test_documents(comparison: Comparison) -> None:
    answers = {one.arm: one for one in comparison.documents}
    assert answers["with"].documents == DOCUMENTS
    interval = answers["with"].per_token
    assert interval is not None
    assert interval.low < EFFECT["with"] < interval.high
    assert interval.high - interval.low < 0.01
    bits = answers["with"].bits_per_byte
    assert bits.low * np.log(2) * 3 == pytest.approx(interval.low, rel=0.02)


def test_files_of_a_report(comparison: Comparison, tmp_path: Path) -> None:
    path = write_report(comparison, tmp_path / "first")
    text = path.read_text(encoding="utf-8")
    assert re.search(r"\| with \| 3 \| 2\.\d{4} .* \| better \| better \|", text)
    assert "HumanEval 20.73 -> 31.10 (report §6)" in text
    stage = text[text.index("## By stage") :]
    assert re.search(r"\| with \| 0\.7000 .*\| 0\.2500 ", stage)
    assert re.search(r"\| without \|  \|  \|", stage)
    assert "no permutation test reaches p < 0.25" in text
    for line in text.splitlines():
        if line.startswith("| with "):
            assert "0.-" not in line
    page = (path.parent / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "HumanEval 20.73 -&gt; 31.10" in page
    with (path.parent / "report.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["metric"], row["arm"]) for row in rows[:2]] == [
        ("valid_loss", "with"),
        ("valid_loss", "flat"),
    ]
    assert float(rows[0]["low"]) < float(rows[0]["difference"]) < float(rows[0]["high"])
    with (path.parent / "runs.csv").open(newline="", encoding="utf-8") as stream:
        assert len(list(csv.DictReader(stream))) == 9
    again = write_report(comparison, tmp_path / "second").parent
    for file in path.parent.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_missing_tasks(results: Path, tmp_path: Path) -> None:
    results = rewritten(results, tmp_path)
    shutil.rmtree(results / NAME / "tiny" / "flat")
    shutil.rmtree(results / NAME / "tiny" / "with" / "seed_2")
    write_task(results, "with", 3, state="failed")
    (results / NAME / "tiny" / "gone").mkdir()
    shutil.copytree(
        results / NAME / "tiny" / "with" / "seed_1", results / NAME / "tiny" / "gone" / "seed_1"
    )
    comparison = compared(results)
    assert set(comparison.absent) == {
        ("flat", "no task has run"),
        ("with, seed 2", "no task has run"),
        ("with, seed 3", "failed: out of memory"),
        ("gone, seed 1", "the study has no such arm any more"),
    }
    answers = {one.arm: one for one in comparison.answers["valid_loss"]}
    assert answers["with"].seeds == (1,)
    assert answers["with"].interval is None
    assert answers["flat"].word == "undecided"
    text = write_report(comparison, tmp_path / "report").read_text(encoding="utf-8")
    assert "too few seeds: 1 of the 3" in text
    assert "| with, seed 3 | failed: out of memory |" in text


def test_nothing_has_run(tmp_path: Path) -> None:
    comparison = compared(tmp_path)
    assert len(comparison.absent) == 3
    assert "no task has run" in write_report(comparison, tmp_path / "report").read_text()


def test_documents_that_differ(results: Path, tmp_path: Path) -> None:
    results = rewritten(results, tmp_path)
    length = 256
    fewer = sums_of("with", 1, length=length, documents=DOCUMENTS)
    changed = dataclasses.replace(fewer, bytes=fewer.bytes + (np.arange(DOCUMENTS) < 20))
    write_task(results, "with", 1, sums=changed)
    comparison = compared(results)
    assert any("over the 100 documents" in note for note in comparison.notes)
    tokens = fewer.tokens[20:]
    assert comparison.figures["valid_loss"]["with"][1] == pytest.approx(
        fewer.nats[20:].sum() / tokens.sum()
    )
    assert comparison.documents[0].documents == 100
    write_task(results, "with", 1, sums=dataclasses.replace(fewer, corpora=("other",)))
    comparison = compared(results)
    assert any("No document is common" in note for note in comparison.notes)
    assert comparison.documents == ()
    write_task(results, "with", 1, sums=dataclasses.replace(fewer, tokens=fewer.tokens + 1))
    comparison = compared(results)
    assert any("compare bits per byte" in note for note in comparison.notes)
    assert comparison.documents[0].per_token is None
    shutil.rmtree(results / NAME / "tiny" / "with" / "seed_1" / "validation")
    comparison = compared(results)
    assert any("as logged" in note for note in comparison.notes)
    assert comparison.figures["valid_loss"]["with"][1] == 4.0


def doubt_of_times(results: Path) -> tuple[str, str]:
    """Return why times are no evidence, and the verdict on them; check the report's cells."""
    comparison = compared(results)
    (answer, _) = comparison.answers["step_seconds"]
    text = write_report(comparison, results / "report").read_text(encoding="utf-8")
    assert ("no evidence (2.00)" in text) == bool(comparison.time_doubt)
    assert ("Times are no evidence" in text) == bool(comparison.time_doubt)
    assert comparison.answers["valid_loss"][0].word == "better"
    return comparison.time_doubt, answer.word


def test_times_without_doubt(results: Path, tmp_path: Path) -> None:
    assert doubt_of_times(rewritten(results, tmp_path)) == ("", "worse")


def test_tasks_that_shared_a_machine(results: Path, tmp_path: Path) -> None:
    results = rewritten(results, tmp_path)
    write_task(results, "with", 1, hours=(0, 23))
    doubt, word = doubt_of_times(results)
    assert "tasks of the study shared a machine" in doubt
    assert word == "undecided"


def test_other_processes_beside_a_task(results: Path, tmp_path: Path) -> None:
    results = rewritten(results, tmp_path)
    write_task(results, "flat", 1, others=0.5)
    write_task(results, "flat", 2, others=1.25)
    assert doubt_of_times(results) == (
        "other processes kept 1.2 of 8 cores busy while flat seed 2 trained",
        "undecided",
    )
    write_task(results, "flat", 1, others=0.3)
    write_task(results, "flat", 2, others=0.3)
    assert doubt_of_times(results) == ("", "worse")


def test_a_start_whose_load_nothing_shows(results: Path, tmp_path: Path) -> None:
    results = rewritten(results, tmp_path)
    write_task(results, "flat", 2, others=None)
    doubt, word = doubt_of_times(results)
    assert doubt == "nothing shows what else ran beside 1 of the 9 runs"
    assert word == "undecided"
    # A start that was killed has left no end.
    folder = write_task(results, "flat", 2)
    lines = (folder / "provenance.jsonl").read_text(encoding="utf-8")
    (folder / "provenance.jsonl").write_text(lines.splitlines()[0] + "\n" + lines)
    assert "1 of the 9 runs" in doubt_of_times(results)[0]


def test_a_seed_that_no_arm_has(results: Path, tmp_path: Path) -> None:
    results = rewritten(results, tmp_path)
    for arm in STUDY.arms:
        write_task(results, arm.name, 4)
        shutil.rmtree(task_folder(results, NAME, "tiny", arm.name, 2))
    comparison = compared(results)
    assert ("with, seed 2", "no task has run") in comparison.absent
    (answer, _) = comparison.answers["valid_loss"]
    assert (answer.seeds, answer.look, answer.word) == ((1, 3, 4), None, "undecided")


def test_an_arm_that_is_the_control(results: Path, tmp_path: Path) -> None:
    results = rewritten(results, tmp_path)

    def copy(seed: int) -> None:
        files = [
            task_folder(results, NAME, "tiny", arm, seed) / "metrics.jsonl"
            for arm in ("without", "flat")
        ]
        shutil.copy(*files)

    copy(1)
    copy(2)
    assert compared(results).notes == ()
    copy(3)
    (note,) = compared(results).notes
    assert note.startswith("flat is without to the last digit of every step")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"metrics": (Metric("valid_loss", delta=0.5), STUDY.metrics[1])},
            "metrics valid_loss 0.05, step_seconds 0.01 -> valid_loss 0.5, step_seconds 0.01.",
        ),
        (
            {"metrics": STUDY.metrics[::-1]},
            "metrics valid_loss 0.05, step_seconds 0.01 -> step_seconds 0.01, valid_loss 0.05.",
        ),
        ({"seeds": (3,)}, "seeds 3, 5, 8 -> 3."),
        ({"control": "with", "claim": None}, "control without -> with; expected with better -> no"),
        ({"arms": STUDY.arms[:2]}, "arms with, without, flat -> with, without."),
    ],
    ids=["delta", "order", "looks", "control", "arms"],
)
def test_what_was_stated_before_the_runs(
    results: Path, change: dict[str, object], words: str
) -> None:
    study = dataclasses.replace(STUDY, **change)  # type: ignore[arg-type]
    notes = [note for note in compared(results, study).notes if "The study has changed" in note]
    assert len(notes) == 1
    assert words in notes[0]


def test_a_study_that_was_stated_after_its_runs(results: Path, tmp_path: Path) -> None:
    results = rewritten(results, tmp_path)
    file = results / NAME / "tiny" / "stated.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("2026-11-26T00", "2026-11-27T05:30"))
    (note,) = compared(results).notes
    # Tasks of seed 1 began at 3, 4 and 5.
    assert note.startswith("3 of the 9 runs began before the study was stated")
    file.unlink()
    assert "stated before the runs (stated.json)" in compared(results).notes[0]
    state(STUDY, file.parent)
    stated = read_statement(file.parent)
    assert stated == Statement.of(STUDY, time=stated.time if stated else "")
    # The first statement stays.
    state(dataclasses.replace(STUDY, seeds=(2,)), file.parent)
    assert read_statement(file.parent) == stated


def test_metric_that_no_file_has(results: Path) -> None:
    study = dataclasses.replace(STUDY, metrics=(*STUDY.metrics, Metric("needle", delta=0.1)))
    comparison = compared(results, study)
    assert "needle: the run has no figure of it from `mellum2 ablate evaluate`" in comparison.notes
    assert {one.word for one in comparison.answers["needle"]} == {"undecided"}


def test_metrics_that_an_evaluation_gives(results: Path, tmp_path: Path) -> None:
    copy = rewritten(results, tmp_path)
    figures = [
        {"name": name, "value": value, "items": items}
        for name, value, items in (("found", 0.0, 4), ("preferred", 0.5, 4), ("preferred", 0.2, 2))
    ]
    file = task_folder(copy, NAME, "tiny", "with", 2) / "eval_needle.json"
    file.write_text(json.dumps({"measures": [{"name": "needle", "figures": figures}]}))
    comparison = compared(copy)
    assert comparison.figures["needle"] == {"with": {2: pytest.approx((4 * 0.5 + 2 * 0.2) / 6)}}
    file.write_text('{"measures": 1}')
    with pytest.raises(InputError, match="is no result of `mellum2 eval`"):
        compared(copy)


def test_only_finished_tasks_are_evaluated_and_once(results: Path, tmp_path: Path) -> None:
    copy = rewritten(results, tmp_path)
    study = dataclasses.replace(STUDY, metrics=(Metric("needle", delta=0.05),))
    write_task(copy, "with", 1, state="failed")
    write_task(
        copy, "flat", 2, change=lambda run: apply_overrides(run, ["loss.bias_update_rate=0.001"])
    )
    asked = []

    def command(folder: Path, measure: str) -> list[str]:
        asked.append(f"{folder.parent.name} {folder.name}")
        if asked[-1] == "flat seed_3":
            return [sys.executable, "-c", "raise SystemExit(1)"]
        (folder / f"eval_{measure}.json").write_text('{"measures": []}')
        return [sys.executable, "-c", ""]

    failed = list(evaluate_tasks(study, tasks(copy), command=command))
    assert failed == ["flat seed 3: needle ended with exit code 1"]
    assert len(asked) == 9 - 2
    assert "flat seed_2" not in asked
    assert "with seed_1" not in asked
    asked.clear()
    assert list(evaluate_tasks(study, tasks(copy), command=command)) == failed
    assert asked == ["flat seed_3"]


def test_damaged_run(results: Path, tmp_path: Path) -> None:
    results = rewritten(results, tmp_path)
    (results / NAME / "tiny" / "with" / "seed_1" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="not a metrics record"):
        compared(results)


def test_metrics_that_end_before_the_run(results: Path, tmp_path: Path) -> None:
    results = rewritten(results, tmp_path)
    file = task_folder(results, NAME, "tiny", "with", 1) / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if '"step": 10' not in line))
    with pytest.raises(InputError, match=r"done after 10 steps, and step 9 is the last"):
        compared(results)


def test_text_of_others_is_no_markup(results: Path, tmp_path: Path) -> None:
    study = dataclasses.replace(
        STUDY,
        question="Is a | b <script>?",
        arms=(*STUDY.arms, Arm("none", "loss.z_loss_coef=0.02")),
    )
    folder = write_report(compared(results, study), tmp_path).parent
    assert "<script>" not in (folder / "report.html").read_text(encoding="utf-8")
