"""Runs on disk: their progress and state, and the numbers that they logged."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from mellum2_megatron.checkpoint.folder import RUN_FILE, tracked_iteration
from mellum2_megatron.checkpoint.run_folder import read_run
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.provenance import RECORDS_FILE, read_records
from mellum2_megatron.metrics import read_metrics
from mellum2_megatron.metrics.log import METRICS_FILE, Record, series
from mellum2_megatron.metrics.plots import Curves

State = Literal["finished", "stopped", "failed", "running", "new", "unreadable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOnDisk:
    """A run folder at a glance.

    Attributes:
        folder: run folder.
        state: ``finished``: its last step is saved. ``stopped``: told to stop, and saved.
            ``failed``: it ended otherwise. ``running``: started, and active within its own
            ``timeout_minutes``, before a first step ``setup_timeout_minutes``. ``new``: never
            started. ``unreadable``: see ``problem``.
        recipe: name of the recipe; empty (default) if unreadable.
        step: last logged step, or that of the newest checkpoint if it is later; default 0.
        steps: number of steps of the whole run; default 0 if unreadable.
        samples: samples consumed at the last logged step; None (default): none logged.
        loss: last logged training loss, nats a token; None (default): none logged.
        valid_loss: last validation loss, nats a token; None (default): none logged.
        changed: time of the last change, seconds since the epoch.
        problem: one line about a file that cannot be read; empty (default): none.
    """

    folder: Path
    state: State
    recipe: str = ""
    step: int = 0
    steps: int = 0
    samples: float | None = None
    loss: float | None = None
    valid_loss: float | None = None
    changed: float
    problem: str = ""

    @classmethod
    def of(cls, folder: Path) -> RunOnDisk:
        """Read a run folder; a damaged file becomes a ``problem``, not an error."""
        files = [folder / name for name in (RUN_FILE, METRICS_FILE, RECORDS_FILE)]
        changed = max(path.stat().st_mtime for path in files if path.exists())
        try:
            run = read_run(folder / RUN_FILE, warn=False)
        except InputError as error:
            return cls(folder=folder, state="unreadable", changed=changed, problem=str(error))
        records: list[Record] = []
        problem = ""
        if (folder / METRICS_FILE).exists():
            try:
                records = read_metrics(folder / METRICS_FILE)
            except InputError as error:
                problem = str(error)
        losses, valid_losses = series(records, "lm_loss")[1], series(records, "lm_loss", "valid")[1]
        logged, samples = series(records, "samples")
        saved = tracked_iteration(folder) or 0
        steps = run.schedule.train_steps
        # Nothing is written before the first step.
        silence = run.timeout_minutes if samples else run.setup_timeout_minutes
        return cls(
            folder=folder,
            state=_state(
                read_records(folder),
                is_finished=saved >= steps,
                is_active=time.time() - changed < silence * 60,
            ),
            recipe=run.name,
            step=max([saved, *logged[-1:]]),
            steps=steps,
            samples=samples[-1] if samples else None,
            loss=losses[-1] if losses else None,
            valid_loss=valid_losses[-1] if valid_losses else None,
            changed=changed,
            problem=problem,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as JSON values; a loss that is not finite is its name."""
        losses = {"loss": self.loss, "valid_loss": self.valid_loss}
        return {
            "folder": str(self.folder),
            "state": self.state,
            "recipe": self.recipe,
            "step": self.step,
            "steps": self.steps,
            "samples": self.samples,
            **{
                name: value if value is None or math.isfinite(value) else str(value)
                for name, value in losses.items()
            },
            "changed": datetime.fromtimestamp(self.changed).astimezone().isoformat("T", "seconds"),
            "problem": self.problem,
        }


def runs_in(folder: Path) -> list[RunOnDisk]:
    """Return the runs in a folder and its sub-folders, the one that changed last at the end.

    Folders inside a run folder are not searched: its checkpoints hold thousands of files.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(
            str(folder), rule="there is no such folder", fix="name a folder of runs, such as runs"
        )
    found, waiting = [], [folder]
    while waiting:
        place = waiting.pop()
        if (place / RUN_FILE).is_file():
            found.append(RunOnDisk.of(place))
            continue
        waiting += [
            child
            for child in place.iterdir()
            if child.is_dir() and not child.is_symlink() and not child.name.startswith(".")
        ]
    return sorted(found, key=lambda run: (run.changed, run.folder))


def read_curves(path: Path) -> Curves:
    """Read the metrics of a run.

    Args:
        path: run folder, its ``run.yaml`` or its ``metrics.jsonl``.

    Raises:
        InputError: no such folder or file, no metrics yet, or a damaged line.
    """
    if path.is_dir() or path.name == RUN_FILE:
        folder = path if path.is_dir() else path.parent
        file = folder / METRICS_FILE
        if not file.is_file():
            raise InputError(
                str(folder),
                rule=f"it has no {METRICS_FILE}: no run has logged a step in it",
                fix="name the folder of a training run; `mellum2 runs FOLDER` lists them",
            )
    else:
        file = path
    records = read_metrics(file)
    if not any(record.kind == "train" for record in records):
        raise InputError(
            str(file),
            rule="no step of a training is in it yet",
            fix="wait for logging.log_interval steps, or name another run",
        )
    run_file = file.parent / RUN_FILE
    # A metrics file that was copied out of its run folder is drawn without a recipe.
    recipe = read_run(run_file, warn=False).name if run_file.is_file() else ""
    name = str(file.parent) if file.name == METRICS_FILE else str(file)
    return Curves(name=name, records=records, recipe=recipe)


def _state(lines: list[dict[str, Any]], *, is_finished: bool, is_active: bool) -> State:
    """Return the state of a readable run, from the lines of its ``provenance.jsonl``."""
    if is_finished:
        return "finished"
    last = next((line for line in reversed(lines) if line.get("event") != "launch"), None)
    if last is None:
        return "new"
    if last.get("event") == "end":
        return "stopped" if last.get("outcome") == "stopped" else "failed"
    return "running" if is_active else "failed"
