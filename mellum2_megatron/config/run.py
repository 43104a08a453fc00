"""A run: everything that decides the numbers of a training, as one typed value.

`to_yaml` and `from_yaml` are exact inverses, so the ``run.yaml`` beside a run's checkpoints is
complete.
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
from mellum2_megatron.common.field_checks import (
    require,
    require_not_negative,
    require_positive,
)
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
        tokenizer: tokenizer folder in Hugging Face format; None (default): ``path/tokenizer``.
        train, valid: Megatron indexed datasets to blend in place of the folder's own two, as
            ``(weight, prefix)`` pairs; a prefix is a path without ``.bin`` or ``.idx``. Default:
            none.
        seed: seed of the shuffling; None (default): the run's seed.
        workers: reading processes of each rank, default 2; 0: the rank itself reads.
        cache: folder of the shuffling index, which Megatron builds once for each data set; None
            (default): ``path/cache``.
        first_sample: sample count of the training at which this run's data begin, default 0. A run
            that continues another one (``checkpoint.continue_from``) on data of its own begins at
            that run's ``schedule.train_samples``. The phases of the report's pre-training do so.

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
        require_not_negative("data.workers", self.workers, fix="use 0 to read in the rank itself")
        require_not_negative("data.first_sample", self.first_sample, fix="use 0")
        for key, blend in (("data.train", self.train), ("data.valid", self.valid)):
            for weight, prefix in blend:
                require_positive(f"{key}: weight of {prefix}", weight, fix="drop the set instead")

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
        eval_batch_size: sequences of a validation batch; None (default): as in the last training
            step of the run.
        tensorboard: write TensorBoard events, default true.
        wandb_project: project on Weights & Biases; None (default): do not log to W&B.
        wandb_entity: W&B account; None (default): the user's default one.
        wandb_name: display name in W&B; None (default): the run's ``name``.

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
        require_positive("logging.log_interval", self.log_interval)
        require_positive("logging.eval_interval", self.eval_interval)
        if self.eval_batch_size is not None:
            require_positive("logging.eval_batch_size", self.eval_batch_size)
        require_not_negative("logging.eval_iterations", self.eval_iterations, fix="use 0")
        # Without a project nothing is logged to W&B, so these two would be dropped in silence.
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
    """Checkpoints that a run writes, and the one it starts from; intervals are in optimizer steps.

    Attributes:
        output: run folder; None (default) until ``mellum2 train --output`` sets it. If it holds a
            checkpoint, the run resumes that one.
        save_interval: steps between two checkpoints, default 1000. The last step saves too.
        retain_interval: interval of the checkpoints to keep for good, a multiple of
            ``save_interval``; the others are pruned, except the newest. None (default): keep all,
            or only the newest ``keep_last``.
        keep_last: number of newest checkpoints to keep; None (default): 1 with a
            ``retain_interval``, else all. With 2 or more, an intact one is left if the newest turns
            out to be damaged.
        verify: comparison with the checkpoint's manifest before loading. ``hash``: content of
            every file. ``size``: sizes only. ``off``: none. Default ``hash``.
        async_save: write checkpoints while training continues, default false; GPUs only.
        any_layout: store optimizer state in a form that every layout can resume, default true.
            With false only the number of data-parallel ranks may change. Adam runs then save
            faster, because no rank collects the state of the others.
        load: checkpoint folder of an imported model or another run, default none. Its weights start
            this run if ``output`` has no checkpoint; optimizer state and step count start anew.
        continue_from: checkpoint folder of another run, default none. Its whole state starts this
            run if ``output`` has no checkpoint: weights, optimizer, step and sample count, random
            numbers. Used for the next phase of one training.

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
        require_positive("checkpoint.save_interval", self.save_interval)
        if self.keep_last is not None:
            require_positive(
                "checkpoint.keep_last", self.keep_last, fix="use 2, or null to keep all"
            )
        if self.retain_interval is not None:
            # Only a step that saves can be kept, so the fix names the next multiple.
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
        description: one line about the recipe.
        architecture: the model.
        layout, optimizer, loss, schedule, precision, stability, data, logging, checkpoint: one
            section each, see their classes.
        seed: seed of the initial weights, and of the shuffling unless ``data.seed`` is set;
            default 1234.
        backend: implementation of the layers. ``te``: Transformer Engine, on GPUs. ``torch``: plain
            PyTorch, anywhere. ``auto`` (default): te on a GPU, torch on a CPU.
        timeout_minutes: longest time without a new micro-batch, in minutes, default 10. The run
            then stops and names the slow ranks.
        sources: sources of the values, by key (``optimizer.lr``) or section (``optimizer``), such
            as a place in the report; see `source`. Default none.

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
        require_positive("timeout_minutes", self.timeout_minutes, fix="use 10")
        require(
            self.data.first_sample < self.schedule.train_samples,
            f"data.first_sample={self.data.first_sample}",
            rule=f"the run ends at schedule.train_samples={self.schedule.train_samples}",
            fix="use 0, or the last sample of the run that this one continues",
        )
        # Checked, because a mistyped key would silently leave a value without its source.
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
        """Return the source of ``key``: its own, or that of the innermost section around it.

        None if neither the key nor a section around it has one.
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
            continue  # `sources` describes the other keys and cannot be set itself
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
    """YAML writer that gives each key a line and writes lists in brackets."""

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

    # `to_yaml` writes every key, so that a new default cannot change an old run. A missing key is
    # therefore younger than the file.
    def warn_of_default(key: str) -> None:
        logger.warning("the run file is from before %s existed; taking its default", key)

    values = read_yaml(text, document="run file", fix="give a file that `mellum2 train` wrote")
    return from_mapping(Run, values, document="run file", on_default=warn_of_default)
