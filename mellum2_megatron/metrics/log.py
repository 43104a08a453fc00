"""A run's log: ``metrics.jsonl``, TensorBoard, Weights & Biases and the console, fed with the same
numbers.

``metrics.jsonl`` holds one JSON object a line::

    {"kind": "train", "step": 10, "lm_loss": 8.3182, "learning_rate": 0.0003, ...}
    {"kind": "valid", "step": 10, "lm_loss": 8.2907}
    {"kind": "event", "step": 11, "note": "the loss is nan on rank 1: the update is skipped",
     "value": "nan", "rank": 1}

Numbers that JSON lacks are the strings ``"nan"``, ``"inf"`` and ``"-inf"``. After a resume from
step k the file holds every step once: lines of later steps, which the earlier process wrote and the
checkpoint does not know of, are dropped.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import atomic_path, write_text
from mellum2_megatron.metrics.console import TrainingConsole

Kind = Literal["train", "valid", "event"]
METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_run_id.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What was logged at one step: while training, at a validation, or because something happened
    (with a note)."""

    kind: Kind
    step: int
    values: dict[str, float]
    note: str = ""


class MetricsLogger:
    """Writes a run's metrics on rank 0; on every other rank it does nothing.

    Args:
        output_dir: the run's folder; receives ``metrics.jsonl``, ``tensorboard/`` and ``wandb/``.
        rank: the process writes only when this is 0.
        world_size: processes of the run, for the record.
        run_name: title on the console and display name in W&B.
        total_steps: optimizer steps of the whole run.
        total_samples: sequences of the whole run.
        tensorboard: write TensorBoard events.
        wandb_project: write to Weights & Biases under this project; None for not at all. Without an
            API key in the environment the W&B run is kept in ``output_dir/wandb`` (offline mode),
            for ``wandb sync``.
        wandb_entity: account there.
        config: recorded with the W&B run.
        resume_step: step of the checkpoint that was loaded; 0 for a new run.

    Raises:
        InputError: W&B is asked for and not installed, or an existing ``metrics.jsonl`` is damaged.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        rank: int,
        world_size: int,
        run_name: str,
        total_steps: int,
        total_samples: int,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        wandb_entity: str | None = None,
        config: Mapping[str, Any] | None = None,
        resume_step: int = 0,
    ) -> None:
        self._active = rank == 0
        if not self._active:
            return
        self._folder = Path(output_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / METRICS_FILE
        _drop_after(path, resume_step)
        self._tensorboard: Any = None
        self._wandb: Any = None
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        self._console = TrainingConsole(
            title=f"{run_name} on {processes}",
            total_steps=total_steps,
            total_samples=total_samples,
            resume_step=resume_step,
        )
        try:
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # Readers forget what an earlier process logged after the checkpoint.
                purge = resume_step + 1 if resume_step else 0
                self._tensorboard = SummaryWriter(
                    str(self._folder / "tensorboard"), purge_step=purge
                )  # type: ignore[no-untyped-call]
            if wandb_project is not None:
                self._wandb = self._open_wandb(
                    wandb_project, wandb_entity, run_name, dict(config or {}), resume_step
                )
        except BaseException:
            self._console.close()
            raise
        self._file = path.open("a", encoding="utf-8")

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Record a training step; names may be nested with ``/``."""
        if self._active:
            self._record("train", step, values)
            self._console.step(step, values)

    def log_eval(self, step: int, values: Mapping[str, float]) -> None:
        """Record a validation after ``step`` steps."""
        if self._active:
            self._record("valid", step, values)
            self._console.validation(step, values)

    def log_event(self, step: int, note: str, values: Mapping[str, float]) -> None:
        """Record that something happened in a step, in words and numbers."""
        if self._active:
            self._record("event", step, values, note)
            self._console.say(f"step {step}: {note}")

    def last_step(self, kind: Kind) -> int | None:
        """Return the last step of a kind in the file, or None; None too on the ranks that do not
        write."""
        if not self._active:
            return None
        return max(
            (
                record.step
                for record in read_metrics(self._folder / METRICS_FILE)
                if record.kind == kind
            ),
            default=None,
        )

    def close(self) -> None:
        """Flush and finish everything; calling it twice is fine."""
        if not self._active:
            return
        self._active = False
        self._file.close()
        self._console.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            import wandb

            with self._without_its_process():
                self._wandb.finish()
                wandb.teardown()  # finish() returns before W&B's own process has written an offline run to disk (0.31)

    def _record(self, kind: Kind, step: int, values: Mapping[str, float], note: str = "") -> None:
        line: dict[str, Any] = {"kind": kind, "step": step} | ({"note": note} if note else {})
        for name, value in values.items():
            number = float(value)
            line[name] = number if math.isfinite(number) else str(number)
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", float(value), step)
            self._tensorboard.flush()
        if self._wandb is not None:
            with self._without_its_process():
                _log_to_wandb(self._wandb, kind, step, values)

    @contextmanager
    def _without_its_process(self) -> Iterator[None]:
        """Go on where W&B's own process is gone; the run has more to do than to log, a save above
        all.

        Slurm's SIGTERM goes to every process of a step, and ends that one (0.31) while ranks still
        have to save.
        """
        try:
            yield
        except (OSError, EOFError) as error:
            self._wandb = None
            sys.stderr.write(f"W&B: its process is gone ({error}); metrics.jsonl has all steps\n")

    def _open_wandb(
        self, project: str, entity: str | None, name: str, config: dict[str, Any], resume_step: int
    ) -> Any:
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                f"logging.wandb_project={project}",
                rule="W&B is not installed",
                fix="pip install 'mellum2-megatron[wandb]', or set logging.wandb_project=null",
            ) from error
        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None and "WANDB_API_KEY" not in os.environ:
            mode = "offline"
            self._console.say(
                f"W&B: no WANDB_API_KEY, so the run stays in {self._folder / 'wandb'}; upload it with `wandb sync`"
            )
        id_file = self._folder / WANDB_ID_FILE
        if not resume_step or not id_file.is_file():
            write_text(id_file, secrets.token_hex(8) + "\n")
        run = wandb.init(
            project=project,
            entity=entity,
            name=name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=self._folder,
            mode=mode,
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        if run.offline and resume_step:
            # Each start writes a file of its own; uploaded, it replaces the rows of the earlier
            # ones from the first on (wandb issue 4624). And a killed process takes along what was
            # logged in its last 15 seconds. So the newest file is made complete.
            for record in read_metrics(self._folder / METRICS_FILE):
                _log_to_wandb(run, record.kind, record.step, record.values)
        return run


def _log_to_wandb(run: Any, kind: Kind, step: int, values: Mapping[str, float]) -> None:
    # Not wandb's own step: it must only ever grow, and a resumed run repeats steps.
    run.log({"step": step, **{f"{kind}/{name}": float(value) for name, value in values.items()}})


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """Read a ``metrics.jsonl`` in file order. An unfinished last line, left by a killed process, is
    ignored.

    Raises:
        InputError: there is no such file, or another line is not a metrics object.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(
            str(path),
            rule="there is no such metrics file",
            fix="name the metrics.jsonl of a training run",
        )
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    return [
        _parse(line, f"{path} line {number}") for number, line in enumerate(lines[:-1], start=1)
    ]


def series(
    records: Iterable[Record], name: str, kind: Kind = "train"
) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, in file order."""
    found = [
        (record.step, record.values[name])
        for record in records
        if record.kind == kind and name in record.values
    ]
    return [step for step, _ in found], [value for _, value in found]


def _parse(line: str, where: str) -> Record:
    try:
        value = json.loads(line)
        kind, step, note = value.pop("kind"), value.pop("step"), value.pop("note", "")
        if kind not in get_args(Kind) or not isinstance(step, int) or not isinstance(note, str):
            raise ValueError(f"kind {kind!r}, step {step!r}, note {note!r}")
        values = {name: float(number) for name, number in value.items()}
        return Record(kind=kind, step=step, values=values, note=note)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            where, rule=f"it is not a metrics record ({error})", fix="remove the line"
        ) from error


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to and including ``step``, atomically; a new run (step 0) begins with an
    empty file."""
    if not path.is_file():
        return
    if step == 0:
        kept: list[str] = []
    else:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        kept = [
            line
            for number, line in enumerate(lines, start=1)
            if _parse(line, f"{path} line {number}").step <= step
        ]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
