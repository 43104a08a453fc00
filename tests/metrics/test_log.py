"""metrics.jsonl, the console, TensorBoard and W&B offline, also after an interrupted run."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.metrics import console
from mellum2_megatron.metrics.console import TrainingConsole, duration, short_number
from mellum2_megatron.metrics.log import MetricsLogger, Record, read_metrics, series


def logger(folder: Path, **options: Any) -> MetricsLogger:
    defaults: dict[str, Any] = {
        "rank": 0,
        "world_size": 2,
        "run_name": "tiny",
        "total_steps": 100,
        "total_samples": 3200,
        "tensorboard": False,
    }
    return MetricsLogger(folder, **(defaults | options))


def loss_at(step: int) -> float:
    return 8.0 / 3.0 - step / 7.0


def train(log: MetricsLogger, steps: range, offset: float = 0.0) -> None:
    for step in steps:
        values = {
            "lm_loss": loss_at(step) + offset,
            "expert_load/layer_03/max_over_mean": 1.5,
            "samples": 32.0 * step,
        }
        log.log_step(step, values)
        if step % 2 == 0:
            log.log_eval(step, {"lm_loss": loss_at(step) + offset + 0.5})
    log.close()


def test_every_number_comes_back_exactly(tmp_path: Path) -> None:
    train(logger(tmp_path), range(1, 4))
    raw = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in raw] == [
        ("train", 1),
        ("train", 2),
        ("valid", 2),
        ("train", 3),
    ]
    assert raw[0]["lm_loss"] == loss_at(1)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[2] == Record(kind="valid", step=2, values={"lm_loss": loss_at(2) + 0.5})
    assert series(records, "lm_loss") == ([1, 2, 3], [loss_at(1), loss_at(2), loss_at(3)])
    assert series(records, "lm_loss", "valid") == ([2], [loss_at(2) + 0.5])
    assert series(records, "absent") == ([], [])


def test_an_event_has_words_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logger(tmp_path, tensorboard=True)
    log.log_step(1, {"lm_loss": 1.0})
    note = "the loss is nan on rank 3: the update is skipped"
    log.log_event(2, note, {"value": math.nan, "rank": 3.0})
    log.close()
    raw = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert raw == {"kind": "event", "step": 2, "note": note, "value": "nan", "rank": 3.0}
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert (records[1].kind, records[1].note, records[1].values["rank"]) == ("event", note, 3.0)
    assert records[0].note == ""
    assert series(records, "rank") == ([], [])
    assert f"step 2: {note}" in capsys.readouterr().out
    # Lines after the checkpoint's step are dropped, events too.
    train(logger(tmp_path, resume_step=1), range(2, 3))
    kinds = [record.kind for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert kinds == ["train", "train", "valid"]


def test_a_generated_text_keeps_its_prompt_and_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = logger(tmp_path, tensorboard=True)
    log.log_samples(2, [("def f(", "x):\n    return x"), ("é [b]", "")])
    log.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record.kind, record.step) for record in records] == [("sample", 2)] * 2
    assert [(record.prompt, record.note) for record in records] == [
        ("def f(", "x):\n    return x"),
        ("é [b]", ""),
    ]
    assert "step 2/100 | sample | 'def f(' continues as\n    x):\n        return x\n" in (
        capsys.readouterr().out
    )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (text,) = events.Tensors("sample/0/text_summary")
    assert text.tensor_proto.string_val == [b"    def f(x):\n        return x\n"]


def test_numbers_that_json_lacks_survive_as_valid_json(tmp_path: Path) -> None:
    log = logger(tmp_path)
    log.log_step(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record.values["a"])
    assert (record.values["b"], record.values["c"]) == (math.inf, -math.inf)


def test_a_resumed_run_holds_every_step_once(tmp_path: Path) -> None:
    train(logger(tmp_path), range(1, 8), offset=100.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    train(logger(tmp_path, resume_step=4), range(5, 10))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert series(records, "lm_loss")[0] == list(range(1, 10))
    assert series(records, "lm_loss")[1] == [loss_at(step) + 100.0 for step in range(1, 5)] + [
        loss_at(step) for step in range(5, 10)
    ]
    assert series(records, "lm_loss", "valid")[0] == [2, 4, 6, 8]


def test_a_new_run_in_an_old_folder_begins_with_an_empty_file(tmp_path: Path) -> None:
    train(logger(tmp_path), range(1, 8))
    train(logger(tmp_path), range(1, 3))
    assert series(read_metrics(tmp_path / "metrics.jsonl"), "lm_loss")[0] == [1, 2]


def test_only_rank_zero_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(logger(tmp_path / "run", rank=1, tensorboard=True, wandb_project="x"), range(1, 3))
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    log = logger(tmp_path)
    log.log_step(1, {"lm_loss": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    log.close()
    log.close()


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"kind": "train"}',
        '{"kind": "test", "step": 1}',
        '{"kind": "train", "step": 1, "x": "y"}',
    ],
)
def test_a_damaged_file_is_named_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=r"metrics.jsonl line 2"):
        read_metrics(path)
    with pytest.raises(InputError, match=r"metrics.jsonl line 2"):
        logger(tmp_path, resume_step=1)
    assert path.read_text().endswith(line + "\n")
    with pytest.raises(InputError, match="no such metrics file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_tensorboard_reads_the_same_series_across_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(logger(tmp_path, tensorboard=True), range(1, 8), offset=100.0)
    train(logger(tmp_path, tensorboard=True, resume_step=4), range(5, 10))
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/lm_loss",
        "valid/lm_loss",
        "train/samples",
        "train/expert_load/layer_03/max_over_mean",
    }
    losses = {event.step: event.value for event in events.Scalars("train/lm_loss")}
    assert sorted(losses) == list(range(1, 10))
    assert len(events.Scalars("train/lm_loss")) == 9
    for step, value in losses.items():
        assert value == pytest.approx(loss_at(step) + (100.0 if step <= 4 else 0.0), rel=1e-6)


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log with W&B's 7-byte file header.

    It is 32 KiB blocks of parts, each with checksum, length, type and data.
    """
    position, parts = 7, b""
    while position < len(data):
        room = 32768 - position % 32768
        if room < 7:  # too small for a part's header: zeros
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield parts
            parts = b""


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """Rows of an offline W&B run, from its transaction log."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }
            )
    return rows


def test_wandb_without_a_key_keeps_the_series_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log = logger(tmp_path, wandb_project="mellum", config={"recipe": "tiny"})
    log.log_samples(1, [("def f(", "x):")])
    train(log, range(1, 4))
    assert capsys.readouterr().out.count("WANDB_API_KEY") == 1
    first_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert file.name == f"run-{first_id}.wandb"
    rows = [row for row in wandb_history(file) if "train/lm_loss" in row]
    assert [(row["step"], row["train/lm_loss"]) for row in rows] == [
        (step, loss_at(step)) for step in (1, 2, 3)
    ]
    assert rows[0]["train/expert_load/layer_03/max_over_mean"] == 1.5
    (valid,) = [row for row in wandb_history(file) if "valid/lm_loss" in row]
    assert (valid["step"], valid["valid/lm_loss"]) == (2, loss_at(2) + 0.5)
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [[1, "def f(", "x):"]]

    train(logger(tmp_path, wandb_project="mellum", resume_step=3), range(4, 6))
    assert {file.name for file in (tmp_path / "wandb").glob("offline-run-*/*.wandb")} == {
        f"run-{first_id}.wandb"
    }
    train(logger(tmp_path, wandb_project="mellum"), range(1, 2))  # a new run in the old folder
    assert (tmp_path / "wandb_run_id.txt").read_text().strip() != first_id


OUTLIVES = """
import os, sys
import psutil
from mellum2_megatron.metrics import MetricsLogger
log = MetricsLogger(
    sys.argv[1], rank=0, world_size=1, run_name="x", total_steps=3, total_samples=3,
    tensorboard=False, wandb_project="mellum",
)
(core,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
core.terminate()
core.wait(30)
for step in range(1, 4):
    log.log_step(step, {"lm_loss": 1.0})
log.close()
os._exit(75)  # as a rank does that has saved
"""


def test_a_run_outlives_the_process_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's SIGTERM goes to every process of a step; ranks save after it."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", OUTLIVES, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 75, done.stderr
    assert [record.step for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert "W&B: its process is gone" in done.stderr


def test_missing_wandb_is_an_error_with_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"mellum2-megatron\[wandb\]"):
        logger(tmp_path, wandb_project="x")


VALUES = {
    "samples": 640.0,
    "tokens": 163_840.0,
    "lm_loss": 6.12345,
    "mtp_loss": 6.5,
    "aux_loss": 1.0123,
    "z_loss": 2.5,
    "grad_norm": 1.75,
    "learning_rate": 3e-4,
    "tokens_per_second": 5234.0,
    "model_tflops_per_second": 0.1234,
    "expert_load/layer_00/max_over_mean": 1.25,
    "expert_load/layer_01/max_over_mean": 1.75,
    "expert_load/layer_01/min_over_mean": 0.5,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(file: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    shown = TrainingConsole(
        title="tiny on 2 processes", total_steps=30, total_samples=960, file=file
    )
    shown.step(10, VALUES | {"samples": 320.0})
    shown.step(20, VALUES)
    shown.validation(20, {"lm_loss": 6.25})
    return file.getvalue()


def test_a_log_file_gets_one_plain_line_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = show(io.StringIO(), monkeypatch).splitlines()
    common = (
        "tokens 164K | lm loss 6.1235 | mtp loss 6.5000 | aux 1.01 | z 2.5 | grad norm 1.750"
        " | lr 3.00e-04 | busiest expert 1.75x | tokens/s 5.23K | model TFLOP/s 0.123"
    )
    assert lines == [
        "tiny on 2 processes: starting, 30 steps in all",
        f"step 10/30 | samples 320 | {common}",
        f"step 20/30 | samples 640 | {common} | left 0:10",
        "step 20/30 | validation | lm loss 6.2500",
    ]


def test_a_terminal_gets_aligned_rows_and_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = Terminal()
    shown = TrainingConsole(title="tiny", total_steps=30, total_samples=960, file=file)
    shown.step(10, VALUES)
    shown.step(20, VALUES)
    shown.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    header = next(line for line in text.splitlines() if "lm loss" in line)
    rows = [line for line in text.splitlines() if "6.1235" in line]
    assert len(rows) == 2
    end = header.index("lm loss") + len("lm loss")
    assert all(row[end - 6 : end] == "6.1235" for row in rows)
    assert "\x1b[" in file.getvalue()
    assert "20/30" in text


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_a_row_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    file = Terminal()
    shown = TrainingConsole(title="tiny", total_steps=30, total_samples=960, file=file)
    shown.step(20, VALUES)
    shown.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    rows = [line for line in text.splitlines() if "6.1235" in line or "lm loss" in line]
    assert len(rows) == 2
    assert all(min(width, 160) - 30 < len(row) <= width for row in rows), rows
    assert ("model TFLOP/s" in rows[0]) == (width == 200)


def test_numbers_are_shortened_for_reading() -> None:
    assert [short_number(value) for value in (950, 12345, 7_600_000, 0.1234, 0)] == [
        "950",
        "12.3K",
        "7.6M",
        "0.123",
        "0",
    ]
    assert [duration(seconds) for seconds in (59.4, 3725, 90061)] == ["0:59", "1:02:05", "25:01:01"]
