"""Everything that a training run replaces in Megatron's loop, in one table.

Megatron offers a run four hooks of its own: model provider, dataset provider, `forward_step` and
loss function (`loop.run_loop` passes them). The rest of what we need from its loop stands here, as
`Patch`es in the form of ``upstream.patches.PATCHES``: target, upstream fact, version. The code that
does the work stays with its subject (`saving`, `step_guard`, `metrics`, `stop_request`). Each entry
has a test in ``tests/training/test_hooks.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.training import get_args

from mellum2_megatron.checkpoint.saving import with_manifest, with_retention
from mellum2_megatron.upstream import patching
from mellum2_megatron.upstream.patching import Patch

if TYPE_CHECKING:
    from pathlib import Path

    from mellum2_megatron.config import Checkpoint
    from mellum2_megatron.faults.step_guard import StepGuard
    from mellum2_megatron.faults.stop_request import StopRequest
    from mellum2_megatron.training.metrics import TrainingMetrics
    from mellum2_megatron.training.rollouts import RolloutTraining
    from mellum2_megatron.training.samples import TrainingSamples
    from mellum2_megatron.training.tasks import TrainingTasks
    from mellum2_megatron.training.validation_documents import ValidationDocuments


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopParts:
    """The objects of one run that take part in Megatron's loop.

    Attributes:
        checkpoint: checkpoint settings of the run.
        metrics: log of the run.
        sums: sums of each validation by document.
        samples: texts that are generated during the training.
        tasks: tasks that are scored during the training.
        guard: check of each step's losses and gradients.
        add_files: called on one rank with a checkpoint's folder, to add files of our own.
        stop: stop request of this rank.
        pause_watch: context manager in which the hang watch is off.
        rollouts: maker of the samples, of a run that learns from its own answers; else None.
    """

    checkpoint: Checkpoint
    metrics: TrainingMetrics
    sums: ValidationDocuments
    samples: TrainingSamples
    tasks: TrainingTasks
    guard: StepGuard
    add_files: Callable[[Path], None]
    stop: StopRequest
    pause_watch: Callable[[], AbstractContextManager[None]]
    rollouts: RolloutTraining | None = None


def hooks(parts: LoopParts) -> tuple[Patch, ...]:
    """Return the table, bound to the objects of one run."""
    return (
        Patch(
            name="scalars",
            target="megatron.training.global_vars:_GLOBAL_TENSORBOARD_WRITER",
            replacement=parts.metrics.replace_writer,
            why="training/training.py:2588 gives a step's losses, rate and gradient norm to a "
            "TensorBoard writer and to nothing else",
        ),
        Patch(
            name="end-of-step",
            target="megatron.training.training:training_log",
            replacement=parts.metrics.wrap_training_log,
            why="training/training.py:3985 has no callback at the end of a step; this function is "
            "called after every step on every rank",
        ),
        Patch(
            name="validation",
            target="megatron.training.training:evaluate_and_print_results",
            replacement=parts.sums.wrap_validation,
            why="training/training.py:4040 and :1483 have no callback at the end of a validation; "
            "this function is called for each on every rank",
        ),
        Patch(
            name="acceptance",
            target="megatron.core.transformer.multi_token_prediction:"
            "_compute_mtp_acceptance_counts",
            replacement=parts.metrics.wrap_acceptance,
            why="core/transformer/multi_token_prediction.py:863 counts the MTP head's right "
            "predictions in every micro-batch, though few steps are logged",
        ),
        Patch(
            name="samples",
            target="megatron.training.training:post_training_step_callbacks",
            replacement=lambda upstream: parts.tasks.wrap_end_of_step(
                parts.samples.wrap_end_of_step(upstream)
            ),
            why="training/training.py:4068 has no callback between a step's validation and its "
            "save; this function is called there with the model on every rank",
        ),
        Patch(
            name="step",
            target="megatron.training.training:train_step",
            replacement=parts.guard.wrap_train_step,
            why="training/training.py:3856 has no callback around a step, and :2518 holds the "
            "learning-rate schedule back when an update was skipped",
        ),
        Patch(
            name="bad-value",
            target="megatron.core.rerun_state_machine:RerunStateMachine.validate_result",
            replacement=parts.guard.wrap_validate_result,
            why="core/rerun_state_machine.py:534 raises on the rank that saw a non-finite loss or "
            "gradient, before the ranks could decide together to skip the update",
        ),
        Patch(
            name="update-or-skip",
            target="megatron.core.optimizer.optimizer:ChainedOptimizer.prepare_grads",
            replacement=parts.guard.wrap_prepare_grads,
            why="core/optimizer/optimizer.py:1862 is the last point before anything is clipped or "
            "changed; where it returns True, `step` returns without an update",
        ),
        Patch(
            name="save-files",
            target="megatron.core.dist_checkpointing.serialization:save",
            replacement=functools.partial(with_manifest, extra_save=parts.add_files),
            why="training/checkpointing.py:827 writes into the folder whatever is there, and "
            "records no digest of what was written",
        ),
        Patch(
            name="save-checkpoint",
            target="megatron.training.checkpointing:save_checkpoint",
            replacement=functools.partial(
                with_retention, settings=parts.checkpoint, paused=parts.pause_watch
            ),
            why="training/training.py:3086 keeps every checkpoint, and :3772 saves a step twice "
            "where the batch grows",
        ),
        Patch(
            name="stop-signal",
            target="megatron.training.global_vars:_GLOBAL_SIGNAL_HANDLER",
            replacement=lambda _: parts.stop,
            why="training/dist_signal_handler.py:68 listens to one signal, once Megatron is set "
            "up; schedulers send either of two, at any time",
        ),
    )


def rollout_hooks(rollouts: RolloutTraining) -> tuple[Patch, ...]:
    """Return the further entries of a run that learns from its own answers."""
    return (
        Patch(
            name="answers-before-step",
            target="megatron.training.training:train_step",
            replacement=rollouts.wrap_train_step,
            why="training/training.py:3856 has no callback before a step, with the model, on every "
            "rank; data iterators have no model",
        ),
        Patch(
            name="answers-after-update",
            target="megatron.training.training:training_log",
            replacement=rollouts.wrap_training_log,
            why="training/training.py:3985 has no callback between the update and its log",
        ),
        Patch(
            name="answers-validation",
            target="megatron.training.training:post_training_step_callbacks",
            replacement=rollouts.wrap_end_of_step,
            why="training/training.py:4068 has no callback between a step and its save",
        ),
    )


def install_hooks(parts: LoopParts) -> None:
    """Apply the table for the rest of the process; call it once Megatron is set up.

    Not earlier: Megatron asserts that its two globals are None when it sets them
    (training/global_vars.py:83, 0.19.2).

    Raises:
        InputError: the installed megatron-core is not the version of an entry. In a rank
            ``upstream.activate`` has raised it earlier.
    """
    patching.install(hooks(parts))
    if parts.rollouts is not None:
        patching.install(rollout_hooks(parts.rollouts))
    # The loop then calls the handler after each step (training.py:3247), and data loaders' workers,
    # which are started later, survive a stop signal too (datasets/data_samplers.py:94). Set from
    # the start it would make Megatron install its own handler (global_vars.py:149).
    get_args().exit_signal_handler = True
