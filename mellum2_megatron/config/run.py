"""A run: everything that decides the numbers of a training, as one typed value.

`run_yaml` writes and reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError, nearest, shown
from mellum2_megatron.common.field_checks import (
    INT32_MAX,
    INT64_MAX,
    check_fields,
    require,
    require_name,
    require_not_negative,
    require_path,
    require_positive,
)
from mellum2_megatron.common.values import field_types
from mellum2_megatron.config.execution import Execution
from mellum2_megatron.config.layout import Layout
from mellum2_megatron.config.optimizer import Loss, Optimizer
from mellum2_megatron.config.precision import Precision
from mellum2_megatron.config.rl import Rl
from mellum2_megatron.config.schedule import Schedule
from mellum2_megatron.config.stability import Stability
from mellum2_megatron.config.stream import Stream

_WANDB_REFUSES = "/\\#?%:"
_MOST_SETS = 32766
_MOST_MINUTES = 43_200

Backend = Literal["te", "torch"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Training and validation tokens, their tokenizer, and how ranks read them.

    Attributes:
        path: folder written by ``mellum2 data prepare``: packs or Megatron's indexed datasets,
            ``tokenizer/``, ``corpus.json``; with ``phase`` the folder of a corpus plan. Not read
            where the folders in ``train`` give all that is needed.
        sequence_length: tokens of one sequence, 2 or more.
        tokenizer: tokenizer folder in Hugging Face format; None (default): that of the first folder
            in ``train``, else ``path/tokenizer``.
        train: sets to blend in place of ``path``, as ``(weight, folder or prefix)`` pairs. A folder
            is one of ``mellum2 data prepare``, a prefix the path of a Megatron indexed dataset
            without ``.bin`` or ``.idx``. Default: none.
        valid: the same for validation; default: the folders in ``train``, each with its own
            validation split, else ``path``.
        seed: seed of the order of the training data; None (default): the run's seed. The order of a
            validation set has no seed.
        workers: reading processes of each rank, default 2; 0: the rank itself reads.
        cache: folder of the shuffling index, which Megatron builds once for each data set; None
            (default): ``cache/`` beside each data set.
        document_attention: let tokens attend only within their own document; for packs (a folder
            with ``packs.json``), which alone record their documents. None (default): true for
            packs, false for other sets.
        phase: number of a phase of the corpus plan whose folder ``path`` is, 1 or more; its packs
            are blended as the plan says. None (default): ``path`` is not a plan's folder.
        first_sample: sample count of the training at which this run's data begin, default 0. A run
            that continues another one (``checkpoint.continue_from``) on data of its own begins at
            that run's ``schedule.train_samples``. The phases of the report's pre-training do so.
        feed: way of the training samples to the ranks. ``files`` (default): each rank reads them.
            ``redis``: one process reads them and streams them to all; validation is read from
            files. ``rollouts``: the model's own answers to the tasks in ``path``, see `Rl`.
        stream: settings of ``redis``, see `Stream`.

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
    document_attention: bool | None = None
    phase: int | None = None
    first_sample: int = 0
    feed: Literal["files", "redis", "rollouts"] = "files"
    stream: Stream = field(default_factory=Stream)

    def __post_init__(self) -> None:
        check_fields("data", self)
        require(
            isinstance(self.stream, Stream),
            f"data.stream: {shown(self.stream)}",
            rule="must be a Stream",
            fix="give Stream(window=64)",
        )
        for name in ("path", "tokenizer", "cache"):
            require_path(f"data.{name}", getattr(self, name))
        require(
            1 < self.sequence_length <= INT32_MAX,
            f"data.sequence_length={self.sequence_length}",
            rule=f"must be 2 to {INT32_MAX}",
            fix="use 8192",
        )
        require_not_negative(
            "data.workers", self.workers, fix="use 0 to read in the rank itself", most=1024
        )
        if self.phase is not None:
            require_positive("data.phase", self.phase, most=INT64_MAX)
        require_not_negative("data.first_sample", self.first_sample, fix="use 0", most=INT64_MAX)
        if self.seed is not None:  # NumPy's, which shuffles
            require_not_negative("data.seed", self.seed, fix="use null for the run's seed")
        for key, blend in (("data.train", self.train), ("data.valid", self.valid)):
            require(
                len(blend) <= _MOST_SETS,
                f"{key} with {len(blend)} sets",
                rule=f"Megatron blends {_MOST_SETS} sets at most "
                "(core/datasets/blended_dataset.py:50, 0.19.2)",
                fix="join some of them",
            )
            for weight, prefix in blend:
                require_path(key, prefix)
                require_positive(
                    f"{key}: weight of {prefix}", weight, fix="drop the set instead", most=1e12
                )


EVAL_TASKS = ("completion", "fim", "arithmetic", "multiple_choice")
"""Tasks of `logging.eval_tasks`: those of ``mellum2 eval --suite miniature``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Logging:
    """Metrics and validation during training; intervals are in optimizer steps.

    Attributes:
        log_interval: steps between two lines of console and metrics, default 10.
        eval_interval: steps between two validations, default 1000.
        eval_iterations: batches of a validation, default 10; 0: no validation.
        eval_batch_size: sequences of a validation batch; None (default): as in the last training
            step of the run.
        validation_documents: write each validation's sums of nats and bytes by document, for
            comparisons between runs, default false.
        tensorboard: write TensorBoard events, default true.
        wandb_project: project on Weights & Biases; None (default): do not log to W&B.
        wandb_entity: W&B account; None (default): the user's default one.
        wandb_name: display name in W&B; None (default): the run's ``name``.
        sample_prompts: texts that the model continues while it trains, default none. The
            continuations go to all logs.
        sample_interval: steps between two rounds of them, default 1000. The last step has one too.
        sample_tokens: tokens generated after each prompt, default 32.
        eval_tasks: tasks of ``mellum2 eval`` that are scored while the model trains, default none:
            ``completion``, ``fim``, ``arithmetic``, ``multiple_choice``. Their scores go to all
            logs.
        eval_task_interval: steps between two rounds of them, default 1000. The last step has one
            too.

    Raises:
        InputError: an interval or number outside its range, W&B fields without a project, sums
            of a validation without one, a blank prompt, or an unknown task.
    """

    log_interval: int = 10
    eval_interval: int = 1000
    eval_iterations: int = 10
    eval_batch_size: int | None = None
    validation_documents: bool = False
    tensorboard: bool = True
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_name: str | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_interval: int = 1000
    sample_tokens: int = 32
    eval_tasks: tuple[str, ...] = ()
    eval_task_interval: int = 1000

    def __post_init__(self) -> None:
        check_fields("logging", self, many_lines=("sample_prompts",))
        for key, text in (
            ("logging.wandb_project", self.wandb_project),
            ("logging.wandb_entity", self.wandb_entity),
        ):
            refused = [letter for letter in text or "" if letter in _WANDB_REFUSES]
            require(
                not refused and len(text or "") <= 128,
                f"{key}={shown(text)}",
                rule="W&B takes 128 characters at most, and none of / \\ # ? % : "
                "(wandb/sdk/wandb_settings.py:1352, 0.31)",
                fix=f"remove {' '.join(refused)}" if refused else "shorten it",
            )
        require_name("logging.wandb_name", self.wandb_name)
        require_positive("logging.log_interval", self.log_interval)
        require_positive("logging.eval_interval", self.eval_interval)
        if self.eval_batch_size is not None:
            require_positive("logging.eval_batch_size", self.eval_batch_size)
        require_not_negative("logging.eval_iterations", self.eval_iterations, fix="use 0")
        require_positive("logging.sample_interval", self.sample_interval)
        require_positive("logging.eval_task_interval", self.eval_task_interval)
        for task in self.eval_tasks:
            require(
                task in EVAL_TASKS and self.eval_tasks.count(task) == 1,
                f"logging.eval_tasks: {task}",
                rule="each is a task of its own of " + ", ".join(EVAL_TASKS),
                fix=nearest(task, EVAL_TASKS),
            )
        require_positive("logging.sample_tokens", self.sample_tokens, fix="use 32")
        require(
            self.eval_iterations > 0 or not self.validation_documents,
            "logging.validation_documents=true",
            rule="there is no validation: logging.eval_iterations=0",
            fix="set logging.eval_iterations=10",
        )
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
        gather_on_one_rank: with ``any_layout``, collect Adam's state on the first rank of each
            data-parallel group instead of on all of them, default false. It saves main memory,
            on all ranks but that one, and GPU memory on all; that rank then receives and writes
            the state alone, which takes longer (docs/checkpoints.md has the figures).
        parallel_load: read each tensor of a checkpoint on one of the ranks that have the same
            experts, which sends it to the others, default true. With false every rank reads all
            that it asks for: its weights and, with ``any_layout``, the whole of Adam's state.
        reuse_plans: keep the plan of a save for the next ones, default true. A start plans its
            first two saves; after a resume on the same ranks, the checkpoint's plan serves them
            too. If the tensors to save have changed, the save plans anew. With false every save
            plans and checks anew, which blocks training for seconds (docs/checkpoints.md).
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
    gather_on_one_rank: bool = False
    parallel_load: bool = True
    reuse_plans: bool = True
    load: str | None = None
    continue_from: str | None = None

    def __post_init__(self) -> None:
        check_fields("checkpoint", self)
        for name in ("output", "load", "continue_from"):
            require_path(f"checkpoint.{name}", getattr(self, name))
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
        description: one line about the recipe, which `mellum2 recipes` prints; default none.
        architecture: the model.
        layout, optimizer, loss, schedule, precision, execution, stability, data, rl, logging,
            checkpoint: one section each, see their classes.
        seed: seed of the initial weights, and of the order of the training data unless
            ``data.seed`` is set; default 1234.
        seed_weights: numbering of the initial weights' random numbers. ``order`` (default):
            Megatron's, one weight after the other as each rank builds them. ``by_name``: a seed for
            each tensor, layer and expert, so equal weights in every layout, and in another model
            where name and shape agree.
        backend: implementation of the layers. ``te``: Transformer Engine, on GPUs. ``torch``: plain
            PyTorch, anywhere. ``auto`` (default): te on a GPU, torch on a CPU.
        timeout_minutes: longest time without a new micro-batch, in minutes, default 10. The run
            then stops and names the slow ranks.
        setup_timeout_minutes: the same for the first micro-batch of a start, in minutes, default
            60. It counts from the moment at which all ranks have met: imports, checkpoint and the
            index of the data come before that micro-batch.
        sources: sources of the values, by key (``optimizer.lr``) or section (``optimizer``), such
            as a place in the report; see `source`. Default none.

    Raises:
        InputError: a value outside its range, or a source of a key that no run has.
    """

    name: str
    description: str = ""
    architecture: Mellum2Architecture
    layout: Layout = field(default_factory=Layout)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loss: Loss = field(default_factory=Loss)
    schedule: Schedule
    precision: Precision = field(default_factory=Precision)
    execution: Execution = field(default_factory=Execution)
    stability: Stability = field(default_factory=Stability)
    data: Data
    rl: Rl = field(default_factory=Rl)
    logging: Logging = field(default_factory=Logging)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    seed: int = 1234
    seed_weights: Literal["order", "by_name"] = "order"
    backend: Literal["auto", "te", "torch"] = "auto"
    timeout_minutes: float = 10.0
    setup_timeout_minutes: float = 60.0
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields("", self)
        # The default run folder and the name in W&B.
        require_name("name", self.name)
        require(
            "/" not in self.name and self.name not in (".", ".."),
            f"name={self.name}",
            rule="is the name of a run's folder",
            fix="leave out the slash; --output gives another folder",
        )
        require(
            0 < self.seed <= INT32_MAX,
            f"seed={self.seed}",
            rule=f"must be 1 to {INT32_MAX} (megatron/training/initialize.py:436, 0.19.2)",
            fix="use 1234",
        )
        for key, usual in (("timeout_minutes", 10), ("setup_timeout_minutes", 60)):
            require(
                0.01 <= getattr(self, key) <= _MOST_MINUTES,
                f"{key}={getattr(self, key)}",
                rule=f"must be 0.01 to {_MOST_MINUTES}, 30 days",
                fix=f"use {usual}",
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self.architecture, name)
            require(
                all(
                    token is None or token >= 0
                    for token in (value if isinstance(value, tuple) else (value,))
                ),
                f"architecture.{name}={value}",
                rule="a token id is 0 or more",
                fix="use an id or null",
            )
        tokens = self.schedule.lr_horizon * self.data.sequence_length
        require(
            tokens <= INT64_MAX,
            f"schedule.train_samples={self.schedule.train_samples} with "
            f"data.sequence_length={self.data.sequence_length}",
            rule=f"Megatron counts tokens in 64 bits, {INT64_MAX} at most",
            fix="lower one of the two, or schedule.horizon_samples",
        )
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
