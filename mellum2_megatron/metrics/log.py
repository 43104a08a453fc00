r"""A run's log: the same numbers in ``metrics.jsonl``, TensorBoard, Weights & Biases and console.

``metrics.jsonl`` holds one JSON object a line::

    {"kind": "train", "step": 10, "lm_loss": 8.3182, "learning_rate": 0.0003, ...}
    {"kind": "valid", "step": 10, "lm_loss": 8.2907}
    {"kind": "event", "step": 11, "note": "the loss is nan on rank 1: the update is skipped",
     "value": "nan", "rank": 1}
    {"kind": "tasks", "step": 20, "fim/exact": 0.05, "fim/similarity": 0.31}
    {"kind": "sample", "step": 20, "prompt": "def f(", "note": "x):\n    return x"}

Numbers that JSON lacks are the strings ``"nan"``, ``"inf"`` and ``"-inf"``. After a resume from
step k the file holds every step once: lines after step k, which the earlier process wrote, are
dropped.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.files import atomic_path, read_bytes, write_text
from mellum2_megatron.common.json_files import parse_object
from mellum2_megatron.metrics.console import TrainingConsole

Kind = Literal["train", "valid", "event", "sample", "tasks"]
METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_run_id.txt"
_LARGEST_FILE = 1 << 32  # bytes; a line has some 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One line of ``metrics.jsonl``.

    Attributes:
        kind: ``train``: a training step. ``valid``: a validation. ``event``: an incident.
            ``sample``: a text that the model generated. ``tasks``: scores of tasks.
        step: optimizer step.
        values: numbers by name.
        note: description of an event, or the generated text; empty for the other kinds.
        prompt: text that a sample continues; empty for the other kinds.
    """

    kind: Kind
    step: int
    values: dict[str, float]
    note: str = ""
    prompt: str = ""


class MetricsLogger:
    """Writes a run's metrics on rank 0; does nothing on every other rank.

    Args:
        output_dir: the run's folder; receives ``metrics.jsonl``, ``tensorboard/`` and ``wandb/``.
        rank: rank of this process.
        world_size: number of ranks, for the title.
        run_name: title on the console and display name in W&B.
        total_steps: step at which the run ends.
        total_samples: sample count at which the run ends.
        tensorboard: write TensorBoard events, default true.
        wandb_project: project on Weights & Biases; None (default): do not log to W&B. Without an
            API key in the environment the W&B run stays in ``output_dir/wandb`` (offline mode), for
            ``wandb sync``.
        wandb_entity: W&B account; None (default): the user's default one.
        config: values to record with the W&B run, default none.
        resume_step: step of the loaded checkpoint; 0 (default) for a new run.

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
            return  # no folder, file or console exists here; every method checks `_active` first
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

                # TensorBoard then hides what an earlier process logged after the checkpoint.
                purge = resume_step + 1 if resume_step else 0
                self._tensorboard = SummaryWriter(
                    str(self._folder / "tensorboard"), purge_step=purge
                )  # type: ignore[no-untyped-call]
            if wandb_project is not None:
                self._wandb = self._open_wandb(
                    wandb_project, wandb_entity, run_name, dict(config or {}), resume_step
                )
        except BaseException:
            # A progress bar that stays alive would garble the error's text.
            self._console.close()
            raise
        self._file = path.open("a", encoding="utf-8")

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Record a training step; names may have parts, separated by ``/``."""
        if self._active:
            self._record("train", step, values)
            self._console.step(step, values)

    def log_eval(self, step: int, values: Mapping[str, float]) -> None:
        """Record a validation after ``step`` steps."""
        if self._active:
            self._record("valid", step, values)
            self._console.validation(step, values)

    def log_event(self, step: int, note: str, values: Mapping[str, float]) -> None:
        """Record an incident of a step, in words and numbers."""
        if self._active:
            self._record("event", step, values, note)
            self._console.print_line(f"step {step}: {note}")

    def log_tasks(self, step: int, values: Mapping[str, float]) -> None:
        """Record the scores of tasks after ``step`` steps."""
        if self._active:
            self._record("tasks", step, values)
            self._console.tasks(step, values)

    def log_samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Record texts that the model generated after ``step`` steps, as (prompt, text) pairs."""
        if not self._active:
            return
        for number, (prompt, text) in enumerate(texts):
            line = {"kind": "sample", "step": step, "prompt": prompt, "note": text}
            self._file.write(json.dumps(line) + "\n")
            self._console.sample(step, prompt, text)
            if self._tensorboard is not None:
                # Markdown: an indented block keeps the line breaks of code.
                block = "".join(f"    {row}\n" for row in f"{prompt}{text}".split("\n"))
                self._tensorboard.add_text(f"sample/{number}", block, step)
        self._file.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()
        if self._wandb is not None:
            with self._surviving_its_process():
                _log_samples_to_wandb(self._wandb, step, texts)

    def last_step(self, kind: Kind) -> int | None:
        """Return the last step of a kind in the file; None if there is none, or off rank 0."""
        if not self._active:
            return None
        records = read_metrics(self._folder / METRICS_FILE)
        return max((record.step for record in records if record.kind == kind), default=None)

    def close(self) -> None:
        """Flush and close all outputs; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        self._file.close()
        self._console.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            import wandb

            with self._surviving_its_process():
                self._wandb.finish()
                # finish() returns before W&B's own process has written an offline run (0.31).
                wandb.teardown()

    def _record(self, kind: Kind, step: int, values: Mapping[str, float], note: str = "") -> None:
        line: dict[str, Any] = {"kind": kind, "step": step}
        if note:
            line["note"] = note
        for name, value in values.items():
            number = float(value)  # tensors and NumPy scalars are no JSON
            line[name] = number if math.isfinite(number) else str(number)
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()  # a killed run must not lose logged steps
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", float(value), step)
            self._tensorboard.flush()
        if self._wandb is not None:
            with self._surviving_its_process():
                _log_to_wandb(self._wandb, kind, step, values)

    @contextmanager
    def _surviving_its_process(self) -> Iterator[None]:
        """Continue without W&B if W&B's own process is gone.

        Slurm sends SIGTERM to every process of a step. It ends W&B's process (0.31) while the ranks
        still have to save.
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
        # Online without a key W&B prompts for one, and a batch job has no terminal to answer on.
        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None and "WANDB_API_KEY" not in os.environ:
            mode = "offline"
            self._console.print_line(
                f"W&B: no WANDB_API_KEY, so the run stays in {self._folder / 'wandb'}; "
                "upload it with `wandb sync`"
            )
        id_file = self._folder / WANDB_ID_FILE
        # A resumed run continues its W&B run by the id; a new run in the folder gets a new one.
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
            # Each offline start writes a file of its own. Uploading it replaces all rows of earlier
            # files (wandb issue 4624), and a killed process has lost the rows of its last 15
            # seconds. So the newest file gets all earlier rows too.
            records = read_metrics(self._folder / METRICS_FILE)
            for (kind, step), group in itertools.groupby(
                records, key=lambda record: (record.kind, record.step)
            ):
                if kind == "sample":
                    texts = [(record.prompt, record.note) for record in group]
                    _log_samples_to_wandb(run, step, texts)
                else:
                    for record in group:
                        _log_to_wandb(run, kind, step, record.values)
        return run


def _log_to_wandb(run: Any, kind: Kind, step: int, values: Mapping[str, float]) -> None:
    # As a metric, because W&B's own step may only grow and a resumed run repeats steps.
    run.log({"step": step, **{f"{kind}/{name}": float(value) for name, value in values.items()}})


def _log_samples_to_wandb(run: Any, step: int, texts: Sequence[tuple[str, str]]) -> None:
    import wandb

    table = wandb.Table(columns=["step", "prompt", "text"])
    for prompt, text in texts:
        table.add_data(step, prompt, text)
    run.log({"step": step, "samples": table})


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """Read a ``metrics.jsonl`` in file order, without a last line that a killed process cut short.

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
    # Every complete line ends in a newline, so the last item is empty or cut short.
    lines = _lines(file)
    return [
        _parse(line, f"{path} line {number}") for number, line in enumerate(lines[:-1], start=1)
    ]


def series(
    records: Iterable[Record], name: str, kind: Kind = "train"
) -> tuple[list[int], list[float]]:
    """Return steps and values of one metric in records of one kind, in file order."""
    points = [
        (record.step, record.values[name])
        for record in records
        if record.kind == kind and name in record.values
    ]
    return [step for step, _ in points], [value for _, value in points]


def _lines(path: Path) -> list[str]:
    try:
        content = read_bytes(path, largest=_LARGEST_FILE)
    except OSError as error:
        raise InputError(
            str(path), rule=f"cannot be read ({first_line(error)})", fix="check the file"
        ) from error
    return content.decode("utf-8", errors="replace").split("\n")


def _parse(line: str, where: str) -> Record:
    try:
        value = parse_object(line)
        kind, step = value.pop("kind"), value.pop("step")
        note, prompt = value.pop("note", ""), value.pop("prompt", "")
        if kind not in get_args(Kind) or not isinstance(step, int):
            raise ValueError(f"kind {kind!r}, step {step!r}")
        if not isinstance(note, str) or not isinstance(prompt, str):
            raise ValueError(f"note {note!r}, prompt {prompt!r}")
        values = {name: float(number) for name, number in value.items()}
        return Record(kind=kind, step=step, values=values, note=note, prompt=prompt)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            where, rule=f"it is not a metrics record ({error})", fix="remove the line"
        ) from error


def _drop_after(path: Path, step: int) -> None:
    """Drop the lines after ``step`` from the file; for a new run (step 0) drop all."""
    if not path.is_file():
        return
    kept: list[str] = []
    if step > 0:
        lines = _lines(path)[:-1]
        kept = [
            line
            for number, line in enumerate(lines, start=1)
            if _parse(line, f"{path} line {number}").step <= step
        ]
    # Atomic: a job that is killed here starts again and needs the lines that were kept.
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
