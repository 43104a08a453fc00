"""Multiple choice scored by us and by lm-evaluation-harness: the same numbers on the same items.

The harness loads the folder by transformers itself. Needs the extra ``eval``; run it with
``make pytest PYTEST_ARGS=tests/evaluation/test_harness.py`` after ``pip install -e '.[eval]'``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from conversion.huggingface.evaluated_model import TransformersModel
from mellum2_megatron.evaluation import evaluate, plan
from mellum2_megatron.evaluation.multiple_choice import Settings, questions
from tests.conversion.test_generation import make_folder

TASK = "mellum2_miniature_choice"


def _write_task(folder: Path) -> None:
    """Write our questions as a task of the harness."""
    items = [
        {"prompt": item.prompt, "choices": list(item.choices), "answer": item.answer}
        for item in questions(Settings())
    ]
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (folder / "items.jsonl").write_text(lines)
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(task))


def test_the_harness_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = make_folder(tmp_path / "hf", max_position_embeddings=512)
    planned = plan(TransformersModel(model).architecture, ["multiple_choice"])
    report = evaluate(TransformersModel(model), planned, name="hf", suites=["multiple_choice"])
    outcome = report.results[0][1]

    (tmp_path / "task").mkdir()
    _write_task(tmp_path / "task")
    result = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=[TASK],
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
    )
    ours = {figure.name: figure.value for figure in outcome.figures}
    theirs = result["results"][TASK]
    assert theirs["acc,none"] == ours["acc"]
    assert theirs["acc_norm,none"] == ours["acc_norm"]
    samples = sorted(result["samples"][TASK], key=lambda sample: int(sample["doc_id"]))
    assert len(samples) == len(outcome.details) == 16
    for sample, item in zip(samples, outcome.details, strict=True):
        scores = [float(response[0][0]) for response in sample["resps"]]
        assert scores == pytest.approx(item["scores"], abs=1e-3)
