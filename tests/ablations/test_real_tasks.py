"""Two arms trained for real: one command, the same start, the same sequences and documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ablations.running.evaluations import EVALUATIONS
from ablations.running.results import task_folder, tasks_on_disk
from ablations.running.statement import read_statement
from mellum2_megatron.common.machine_load import MachineLoad
from mellum2_megatron.common.provenance import read_records
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.metrics import read_metrics
from mellum2_megatron.metrics.log import METRICS_FILE, series
from tests.ablations.small_study import write_study
from tests.cli.runner import mellum2

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def losses(folder: Path, kind: str = "train") -> list[float]:
    return series(read_metrics(folder / METRICS_FILE), "lm_loss", kind)[1]


def test_two_arms_with_one_seed_begin_alike(small_data: PreparedData, tmp_path: Path) -> None:
    study = write_study(tmp_path / "mine.py", small_data)
    results = tmp_path / "results"
    words = ["ablate", "run", str(study), "--results", str(results), "--seeds", "1"]
    done = mellum2(*words)
    assert done.code == 0, done
    assert "0 to run" in done.out
    base, adam = (task_folder(results, "mine", "tiny", arm, 1) for arm in ("base", "adam"))
    assert {task.record.state for task in tasks_on_disk(results, "mine", "tiny")} == {"done"}
    # The first loss is that of the initial weights on the first sequences, to the last bit.
    # The first step of the warmup has rate 0, so the second loss is theirs too.
    assert losses(base)[:2] == losses(adam)[:2]
    assert losses(base)[2] != losses(adam)[2]
    assert losses(base, "valid") != losses(adam, "valid")
    # What was stated came first, and each run tells how busy it and others kept the machine.
    stated = read_statement(base.parents[1])
    assert stated is not None
    assert stated.time <= min(
        task.record.started for task in tasks_on_disk(results, "mine", "tiny")
    )
    for folder in (base, adam):
        load = MachineLoad.of(read_records(folder)[-1]["load"])
        assert load is not None
        assert 0 < load.own <= load.cores
    # Nothing is trained twice.
    stamp = (base / METRICS_FILE).stat().st_mtime_ns
    again = mellum2(*words)
    assert again.code == 0, again
    assert (base / METRICS_FILE).stat().st_mtime_ns == stamp


def test_an_evaluation_is_that_of_mellum2_eval(small_data: PreparedData, tmp_path: Path) -> None:
    """A measure joins the results: a trained run is exported and asked, by either command."""
    file, results = tmp_path / "mine.py", tmp_path / "results"
    study = write_study(file, small_data)
    options = [str(study), "--results", str(results)]
    words = ["ablate", "evaluate", *options]
    refused = mellum2(*words)
    assert refused.code == 2, refused
    assert "no metric of it comes from `mellum2 eval`" in refused.err
    # Metrics are no part of a task's hash.
    write_study(file, small_data, metric="needle")
    nothing = mellum2(*words)
    assert nothing.code == 2, nothing
    assert "no finished task is there to measure" in nothing.err
    trained = mellum2("ablate", "run", *options, "--seeds", "1", "--only", "base")
    assert trained.code == 0, trained
    done = mellum2(*words)
    assert done.code == 0, done
    (task,) = tasks_on_disk(results, "mine", "tiny")
    needle = EVALUATIONS["needle"]
    written = needle.file(task.folder)
    first, stamp = json.loads(written.read_text()), written.stat().st_mtime_ns
    assert first["model"] == str(task.folder)
    value = needle.value(task.folder)
    assert value is not None
    assert 0 <= value <= 1
    # A measure that is there is not taken twice.
    assert mellum2(*words).code == 0
    assert written.stat().st_mtime_ns == stamp
    # By hand, on the same checkpoint.
    written.unlink()
    own = mellum2("eval", str(task.folder), "--suite", "needle")
    assert own.code == 0, own
    assert json.loads(written.read_text())["measures"] == first["measures"]
    assert needle.value(task.folder) == value
