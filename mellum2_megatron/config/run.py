"""A run: everything that decides what `mellum2 train` computes, as one typed value that round-trips
through YAML."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

import yaml

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.values import (
    StrictLoader,
    field_types,
    from_plain,
    to_plain,
    yaml_problem,
)
from mellum2_megatron.config.layout import Layout
from mellum2_megatron.config.optimizer import Loss, Optimizer
from mellum2_megatron.config.precision import Precision
from mellum2_megatron.config.schedule import Schedule
from mellum2_megatron.config.stability import Stability

logger = logging.getLogger(__name__)

Backend = Literal["te", "torch"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Where the tokens are.

    Attributes:
        path: folder written by ``mellum2 data prepare``: ``train_document.{bin,idx}``,
            ``valid_document.{bin,idx}``, ``tokenizer/``, ``corpus.json``.
        sequence_length: tokens of one sequence.
        tokenizer: tokenizer folder in Hugging Face format; None means ``path/tokenizer``.
        train, valid: ``(weight, prefix)`` pairs of Megatron indexed datasets to blend in place of
            the folder's own two; a prefix is a path without ``.bin``/``.idx``.
        seed: of the shuffling; None means the run's seed.
        workers: processes a rank that read data; 0 reads in the rank itself.
        cache: folder for the shuffling index that Megatron builds once a data set; None means
            beside the data.
        first_sample: sample of the training at which these data begin. 0 unless the run continues
            another one (``checkpoint.continue_from``) on data of its own, as the phases of the
            report's pre-training do: then the ``schedule.train_samples`` of the run before.

    Raises:
        InputError: a length or weight that is not positive.
    """

    path: str
    sequence_length: int
    tokenizer: str | None = None
    train: tuple[tuple[float, str], ...] = ()
    valid: tuple[tuple[float, str], ...] = ()
    seed: int | None = None
    workers: int = 2
    cache: str | None = None
    first_sample: int = 0

    def __post_init__(self) -> None:
        _require(
            "data.sequence_length",
            self.sequence_length,
            self.sequence_length > 1,
            "must be 2 or more",
            "use 8192",
        )
        _require(
            "data.workers",
            self.workers,
            self.workers >= 0,
            "must not be negative",
            "use 0 to read in the rank itself",
        )
        _require(
            "data.first_sample",
            self.first_sample,
            self.first_sample >= 0,
            "must not be negative",
            "use 0",
        )
        for name in ("train", "valid"):
            for weight, prefix in getattr(self, name):
                _require(
                    f"data.{name}: weight of {prefix}",
                    weight,
                    weight > 0,
                    "must be positive",
                    "drop the set instead",
                )

    @property
    def tokenizer_folder(self) -> str:
        """Folder of the tokenizer."""
        return self.tokenizer or str(PurePath(self.path) / "tokenizer")

    @property
    def train_blend(self) -> tuple[tuple[float, str], ...]:
        """``(weight, prefix)`` of every training set."""
        return self.train or ((1.0, str(PurePath(self.path) / "train_document")),)

    @property
    def valid_blend(self) -> tuple[tuple[float, str], ...]:
        """``(weight, prefix)`` of every validation set."""
        return self.valid or ((1.0, str(PurePath(self.path) / "valid_document")),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Logging:
    """What is written while training; intervals are in optimizer steps.

    Attributes:
        log_interval: steps between two lines of console and metrics.
        eval_interval: steps between two validations.
        eval_iterations: batches a validation; 0 for none.
        eval_batch_size: sequences of such a batch; None means the training batch at the end of the
            run.
        tensorboard: write TensorBoard events.
        wandb_project: write to Weights & Biases under this project; None for not at all.
        wandb_entity, wandb_name: account and display name there.
    """

    log_interval: int = 10
    eval_interval: int = 1000
    eval_iterations: int = 10
    eval_batch_size: int | None = None
    tensorboard: bool = True
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("log_interval", "eval_interval", "eval_batch_size"):
            value = getattr(self, name)
            _require(
                f"logging.{name}",
                value,
                value is None or value > 0,
                "must be positive",
                "use 1 or more",
            )
        _require(
            "logging.eval_iterations",
            self.eval_iterations,
            self.eval_iterations >= 0,
            "must not be negative",
            "use 0",
        )
        for name in ("wandb_entity", "wandb_name"):
            value = getattr(self, name)
            if value is not None and self.wandb_project is None:
                raise InputError(
                    f"logging.{name}={value}",
                    rule="needs logging.wandb_project",
                    fix="set logging.wandb_project too",
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Where the run's state goes and comes from; intervals are in optimizer steps.

    Attributes:
        output: folder of the run. A checkpoint found there is resumed. Given on the command line as
            ``--output``.
        save_interval: steps between two checkpoints; one more is written at the end.
        retain_interval: keep only the newest checkpoints and those at multiples of this; None keeps
            all.
        keep_last: how many are the newest that are kept; None means 1 with a ``retain_interval``,
            else all. With 2 or more there is one to go back to when the newest turns out to be
            damaged.
        verify: what is compared with a checkpoint's manifest before anything is loaded from it:
            every file's ``hash``, its ``size`` only, or nothing (``off``).
        async_save: write checkpoints in the background, while training goes on. On GPUs only.
        any_layout: store optimizer state so that every layout can resume it. Otherwise only the
            number of data-parallel ranks may change; saves of an Adam run are then faster, since no
            rank collects what others hold.
        load: folder of a checkpoint whose weights the run starts from when ``output`` has none (an
            imported model, or another run's); its optimizer state and step count are not taken.
        continue_from: folder of another run's checkpoint that the run goes on from when ``output``
            has none, with all of its state: weights, optimizer, step and sample count, random
            numbers. The next phase of one training.
    """

    output: str | None = None
    save_interval: int = 1000
    retain_interval: int | None = None
    keep_last: int | None = None
    verify: Literal["hash", "size", "off"] = "hash"
    async_save: bool = False
    any_layout: bool = True
    load: str | None = None
    continue_from: str | None = None

    def __post_init__(self) -> None:
        _require(
            "checkpoint.save_interval",
            self.save_interval,
            self.save_interval > 0,
            "must be positive",
            "use 1 or more",
        )
        _require(
            "checkpoint.keep_last",
            self.keep_last,
            self.keep_last is None or self.keep_last > 0,
            "must be positive",
            "use 2, or null to keep all",
        )
        if self.retain_interval is not None and (
            self.retain_interval <= 0 or self.retain_interval % self.save_interval
        ):
            above = (max(self.retain_interval, 1) // self.save_interval + 1) * self.save_interval
            raise InputError(
                f"checkpoint.retain_interval={self.retain_interval}",
                rule=f"must be a multiple of checkpoint.save_interval ({self.save_interval})",
                fix=f"use {above} or null",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A complete run; the same value, data and seed give the same numbers.

    Attributes:
        name: of the recipe it came from.
        description: one line.
        architecture: the model.
        layout, optimizer, loss, schedule, precision, stability, data, logging, checkpoint: see
            their classes.
        seed: of initialisation and, unless ``data.seed`` says otherwise, of shuffling.
        backend: ``te`` (Transformer Engine), ``torch`` (anywhere), or ``auto``: te on a GPU, torch
            on a CPU.
        timeout_minutes: a run in which no micro-batch begins for so long is ended, naming the ranks
            that hold it up.
        sources: where values come from, by key (``optimizer.lr``) or by section (``optimizer``);
            see `source`.
    """

    name: str
    description: str
    architecture: Mellum2Architecture
    layout: Layout = field(default_factory=Layout)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loss: Loss = field(default_factory=Loss)
    schedule: Schedule
    precision: Precision = field(default_factory=Precision)
    stability: Stability = field(default_factory=Stability)
    data: Data
    logging: Logging = field(default_factory=Logging)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    seed: int = 1234
    backend: Literal["auto", "te", "torch"] = "auto"
    timeout_minutes: float = 10.0
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(
            "timeout_minutes",
            self.timeout_minutes,
            self.timeout_minutes > 0,
            "must be positive",
            "use 10",
        )
        if self.data.first_sample >= self.schedule.train_samples:
            raise InputError(
                f"data.first_sample={self.data.first_sample}",
                rule=f"the run ends at schedule.train_samples={self.schedule.train_samples}",
                fix="use 0, or where the run that this one continues ended",
            )
        known = keys()
        for key in self.sources:
            if key not in known and not any(name.startswith(f"{key}.") for name in known):
                raise InputError(
                    f"source of {key}", rule="no such key in a run", fix=nearest(key, known)
                )

    def resolved_backend(self, device: Device) -> Backend:
        """Return the backend on ``device``, ``auto`` decided."""
        if self.backend == "auto":
            return "te" if device == "cuda" else "torch"
        return self.backend

    def learning_rate(self, sample: int) -> float:
        """Return the learning rate of the step that starts after ``sample`` samples."""
        return self.schedule.learning_rate(
            sample, peak=self.optimizer.lr, minimum=self.optimizer.min_lr
        )

    def source(self, key: str) -> str | None:
        """Return where the value of ``key`` comes from: its own source, or that of the section it
        lies in."""
        while key and key not in self.sources:
            key = key.rpartition(".")[0]
        return self.sources.get(key)

    @property
    def eval_batch_size(self) -> int:
        """Sequences of a validation batch."""
        return self.logging.eval_batch_size or self.schedule.final_batch_size

    @property
    def train_tokens(self) -> int:
        """Tokens seen by the end of the run."""
        return self.schedule.train_samples * self.data.sequence_length


def keys() -> tuple[str, ...]:
    """Return every key that can be set, in full: ``layout.ep``,
    ``architecture.rope_full_attention.factor`` .."""
    return tuple(_leaf_keys(Run, ""))


def _leaf_keys(cls: type, prefix: str) -> list[str]:
    found: list[str] = []
    for name, annotation in field_types(cls).items():
        if prefix + name == "sources":
            continue
        if dataclasses.is_dataclass(annotation):
            found += _leaf_keys(annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            found.append(prefix + name)
    return found


def to_yaml(run: Run) -> str:
    """Return ``run`` as YAML, complete: every value, and the sources."""
    text: str = yaml.dump(
        to_plain(run), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118
    )
    return text


class _Dumper(yaml.SafeDumper):
    """One key a line, lists in brackets."""

    def represent_sequence(
        self, tag: str, sequence: Iterable[Any], flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)

    def represent_mapping(
        self, tag: str, mapping: Any, flow_style: bool | None = None
    ) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style=False)


def from_yaml(text: str) -> Run:
    """Read what :func:`to_yaml` writes; the result equals the run that was written.

    Raises:
        InputError: not YAML, an unknown or missing key, or a value of another type, each naming the
            full key.
    """
    try:
        values = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        line, problem = yaml_problem(error)
        where = f"run file, line {line}" if line else "run file"
        raise InputError(
            where, rule=f"not YAML ({problem})", fix="give a file that `mellum2 train` wrote"
        ) from None
    run: Run = _build(Run, values, "")
    return run


def _build(cls: type, values: Any, prefix: str) -> Any:
    where = prefix.rstrip(".") or "run file"
    if not isinstance(values, Mapping):
        raise InputError(
            f"{where}: {values!r}", rule="must be a mapping of keys to values", fix="see a run.yaml"
        )
    annotations = field_types(cls)
    for name in values:
        if name not in annotations:
            known = keys() if "." in str(name) else [prefix + known for known in annotations]
            raise InputError(
                f"{prefix}{name}",
                rule="no such key in a run",
                fix=nearest(f"{prefix}{name}", known),
            )
    arguments: dict[str, Any] = {}
    for entry in dataclasses.fields(cls):
        key = prefix + entry.name
        if entry.name not in values:
            if (
                entry.default is dataclasses.MISSING
                and entry.default_factory is dataclasses.MISSING
            ):
                raise InputError(
                    f"{key} is missing", rule="a run cannot do without it", fix=f"add {key}"
                )
            # Every value is written, so that a later change of a default cannot change an old run;
            # a file can lack only keys that are younger than itself.
            logger.warning("the run file is from before %s existed; taking its default", key)
            continue
        value = values[entry.name]
        if dataclasses.is_dataclass(annotations[entry.name]):
            arguments[entry.name] = _build(annotations[entry.name], value, f"{key}.")  # type: ignore[arg-type]
        elif key == "sources":
            arguments[entry.name] = _sources(value)
        else:
            arguments[entry.name] = from_plain(value, annotations[entry.name], key)
    return cls(**arguments)


def _sources(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(f"sources: {value!r}", rule="must map keys to text", fix="use {} for none")
    return dict(value)


def _require(key: str, value: object, holds: bool, rule: str, fix: str) -> None:
    if not holds:
        raise InputError(f"{key}={value}", rule=rule, fix=fix)
