"""A run: all that decides the numbers `mellum2 train` computes, as one typed value.

`to_yaml` and `from_yaml` are exact inverses: ``run.yaml`` beside a run's checkpoints is complete.
"""

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
from mellum2_megatron.common.field_checks import require
from mellum2_megatron.common.values import field_types, from_mapping, read_yaml, to_plain
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
    """Training and validation tokens, their tokenizer, and how ranks read them.

    Attributes:
        path: folder written by ``mellum2 data prepare``: ``train_document.{bin,idx}``,
            ``valid_document.{bin,idx}``, ``tokenizer/``, ``corpus.json``.
        sequence_length: tokens of one sequence, 2 or more.
        tokenizer: tokenizer folder in Hugging Face format; None: ``path/tokenizer``.
        train, valid: ``(weight, prefix)`` pairs of Megatron indexed datasets to blend in place of
            the folder's own two; a prefix is a path without ``.bin`` or ``.idx``. Default: none.
        seed: seed of the shuffling; None: the run's seed.
        workers: reading processes of each rank, default 2; 0: the rank itself reads.
        cache: folder of the shuffling index, which Megatron builds once for each data set; None:
            beside the data.
        first_sample: sample of the training at which these data begin, default 0. A run that
            continues another one on data of its own (``checkpoint.continue_from``) begins at that
            run's ``schedule.train_samples``, as the phases of the report's pre-training do.

    Raises:
        InputError: a length, weight or number outside its range.
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
        require(
            self.sequence_length > 1,
            f"data.sequence_length={self.sequence_length}",
            rule="must be 2 or more",
            fix="use 8192",
        )
        require(
            self.workers >= 0,
            f"data.workers={self.workers}",
            rule="must not be negative",
            fix="use 0 to read in the rank itself",
        )
        require(
            self.first_sample >= 0,
            f"data.first_sample={self.first_sample}",
            rule="must not be negative",
            fix="use 0",
        )
        for key, blend in (("data.train", self.train), ("data.valid", self.valid)):
            for weight, prefix in blend:
                require(
                    weight > 0,
                    f"{key}: weight of {prefix}={weight}",
                    rule="must be positive",
                    fix="drop the set instead",
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
    """Metrics and validation during training; intervals are in optimizer steps.

    Attributes:
        log_interval: steps between two lines of console and metrics, default 10.
        eval_interval: steps between two validations, default 1000.
        eval_iterations: batches of a validation, default 10; 0: no validation.
        eval_batch_size: sequences of a validation batch; None: the training batch at the end of
            the run.
        tensorboard: write TensorBoard events, default true.
        wandb_project: project on Weights & Biases; None: do not log to W&B.
        wandb_entity, wandb_name: W&B account and display name; None: the default account, the
            run's ``name``.

    Raises:
        InputError: an interval or number outside its range, or W&B fields without a project.
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
        require(
            self.log_interval > 0,
            f"logging.log_interval={self.log_interval}",
            rule="must be positive",
            fix="use 1 or more",
        )
        require(
            self.eval_interval > 0,
            f"logging.eval_interval={self.eval_interval}",
            rule="must be positive",
            fix="use 1 or more",
        )
        require(
            self.eval_batch_size is None or self.eval_batch_size > 0,
            f"logging.eval_batch_size={self.eval_batch_size}",
            rule="must be positive",
            fix="use 1 or more",
        )
        require(
            self.eval_iterations >= 0,
            f"logging.eval_iterations={self.eval_iterations}",
            rule="must not be negative",
            fix="use 0",
        )
        require(
            self.wandb_entity is None or self.wandb_project is not None,
            f"logging.wandb_entity={self.wandb_entity}",
            rule="needs logging.wandb_project",
            fix="set logging.wandb_project too",
        )
        require(
            self.wandb_name is None or self.wandb_project is not None,
            f"logging.wandb_name={self.wandb_name}",
            rule="needs logging.wandb_project",
            fix="set logging.wandb_project too",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Checkpoints: where a run saves and where it starts; intervals are in optimizer steps.

    Attributes:
        output: run folder; None until ``mellum2 train --output`` sets it. A checkpoint in it is
            resumed.
        save_interval: steps between two checkpoints, default 1000. The last step saves too.
        retain_interval: interval of the checkpoints to keep for good, a multiple of
            ``save_interval``; the others are pruned, except the newest. None: keep all.
        keep_last: number of newest checkpoints to keep; None: 1 with a ``retain_interval``, else
            all. With 2 or more, one is left if the newest turns out to be damaged.
        verify: comparison with the checkpoint's manifest before loading. ``hash``: content of
            every file. ``size``: sizes only. ``off``: none. Default ``hash``.
        async_save: write checkpoints in the background of training, default false; GPUs only.
        any_layout: store optimizer state in a form that every layout can resume, default true.
            With false only the number of data-parallel ranks may change. Adam runs then save
            faster, because no rank collects the state of the others.
        load: checkpoint folder whose weights alone start the run (an imported model, or another
            run) if ``output`` has no checkpoint. Optimizer state and step count start anew.
        continue_from: checkpoint folder of another run to continue if ``output`` has no checkpoint,
            with all of its state: weights, optimizer, step and sample count, random numbers. Used
            for the next phase of one training.

    Raises:
        InputError: an interval or number outside its range.
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
        require(
            self.save_interval > 0,
            f"checkpoint.save_interval={self.save_interval}",
            rule="must be positive",
            fix="use 1 or more",
        )
        require(
            self.keep_last is None or self.keep_last > 0,
            f"checkpoint.keep_last={self.keep_last}",
            rule="must be positive",
            fix="use 2, or null to keep all",
        )
        if self.retain_interval is not None:
            # Only saved checkpoints can be kept: the next multiple is the nearest that works.
            above = (max(self.retain_interval, 1) // self.save_interval + 1) * self.save_interval
            require(
                self.retain_interval > 0 and self.retain_interval % self.save_interval == 0,
                f"checkpoint.retain_interval={self.retain_interval}",
                rule=f"must be a multiple of checkpoint.save_interval ({self.save_interval})",
                fix=f"use {above} or null",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A complete run; the same value, data and seed give the same numbers.

    Attributes:
        name: name of the recipe.
        description: one line.
        architecture: the model.
        layout, optimizer, loss, schedule, precision, stability, data, logging, checkpoint: one
            section each, see their classes.
        seed: seed of the initial weights, and of the shuffling unless ``data.seed`` is set;
            default 1234.
        backend: implementation of the layers. ``te``: Transformer Engine, on GPUs. ``torch``: plain
            PyTorch, anywhere. ``auto`` (default): te on a GPU, torch on a CPU.
        timeout_minutes: longest time without a new micro-batch, default 10. The run then stops and
            names the slow ranks.
        sources: source of a value, by key (``optimizer.lr``) or section (``optimizer``); see
            `source`.

    Raises:
        InputError: a value outside its range, or a source of a key that no run has.
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
        require(
            self.timeout_minutes > 0,
            f"timeout_minutes={self.timeout_minutes}",
            rule="must be positive",
            fix="use 10",
        )
        require(
            self.data.first_sample < self.schedule.train_samples,
            f"data.first_sample={self.data.first_sample}",
            rule=f"the run ends at schedule.train_samples={self.schedule.train_samples}",
            fix="use 0, or the last sample of the run that this one continues",
        )
        # A source may name a section; a typo would silently leave a value without its source.
        known = keys()
        for key in self.sources:
            if key not in known and not any(name.startswith(f"{key}.") for name in known):
                raise InputError(
                    f"source of {key}", rule="no such key in a run", fix=nearest(key, known)
                )

    def resolved_backend(self, device: Device) -> Backend:
        """Return the backend on ``device``, with ``auto`` decided."""
        if self.backend == "auto":
            return "te" if device == "cuda" else "torch"
        return self.backend

    def learning_rate(self, sample: int) -> float:
        """Return the learning rate of the step that starts after ``sample`` samples."""
        return self.schedule.learning_rate(
            sample, peak=self.optimizer.lr, minimum=self.optimizer.min_lr
        )

    def source(self, key: str) -> str | None:
        """Return the source of ``key``: its own, or that of the innermost section that has one.

        None if neither the key nor a section around it has a source.
        """
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
    """Return the full key of every value in a run.

    Examples: ``seed``, ``layout.ep``, ``architecture.rope_full_attention.factor``.
    """
    return tuple(_leaf_keys(Run, ""))


def _leaf_keys(cls: type, prefix: str) -> list[str]:
    leaves: list[str] = []
    for name, annotation in field_types(cls).items():
        if prefix + name == "sources":
            continue  # about keys, not one of them
        if dataclasses.is_dataclass(annotation):
            leaves += _leaf_keys(annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            leaves.append(prefix + name)
    return leaves


def to_yaml(run: Run) -> str:
    """Return ``run`` as YAML: every value, defaults included, and the sources."""
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
    """Read what `to_yaml` writes; the result equals the run that was written.

    Raises:
        InputError: not YAML, an unknown or missing key, or a value of another type, each naming the
            full key.
    """
    values = read_yaml(text, document="run file", fix="give a file that `mellum2 train` wrote")
    return from_mapping(Run, values, document="run file", on_default=_warn_of_default)


def _warn_of_default(key: str) -> None:
    # Files are written complete, so that a later change of a default cannot change an old run. A
    # file can therefore lack only keys that are younger than the file.
    logger.warning("the run file is from before %s existed; taking its default", key)
