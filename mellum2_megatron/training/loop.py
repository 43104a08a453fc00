"""Wires one run into Megatron's `pretrain`. Import it only after `rank_main` has activated us.

Order in which Megatron 0.19.2 calls us, on every rank:

1. the model provider, once for each part of the model on this rank;
2. having restored a checkpoint, if any: the dataset provider. Its first call (`after_load`) opens
   the log, restores the guard and installs ``hooks.hooks``;
3. for each step, `train_step`: `forward_step` and `sum_loss` for each micro-batch, `prepare_grads`
   once, then `training_log`, a validation where one is due, `post_training_step_callbacks`;
4. `save_checkpoint` where a save is due; after a stop signal a save, then `SystemExit`.
"""

from __future__ import annotations

import functools
import io
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from mellum2_megatron.checkpoint import StartingPoint, output_folder
from mellum2_megatron.checkpoint.data_record import DataRecord
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.checkpoint.resume_keys import Change
from mellum2_megatron.common.files import write_text
from mellum2_megatron.config import Device, Run, to_yaml
from mellum2_megatron.data.feed.sources import check_data
from mellum2_megatron.faults.hang_watch import HangWatch
from mellum2_megatron.faults.step_guard import StepGuard
from mellum2_megatron.faults.stop_request import StopRequest
from mellum2_megatron.model.provider import run_model_provider
from mellum2_megatron.muon import even_shares
from mellum2_megatron.training.datasets import dataset_provider
from mellum2_megatron.training.hooks import LoopParts, install_hooks
from mellum2_megatron.training.metrics import TrainingMetrics
from mellum2_megatron.training.rollouts import RolloutTraining
from mellum2_megatron.training.samples import TrainingSamples
from mellum2_megatron.training.step import forward_step
from mellum2_megatron.training.tasks import TrainingTasks
from mellum2_megatron.training.validation_documents import ValidationDocuments
from mellum2_megatron.upstream import megatron_arguments
from mellum2_megatron.upstream.parser_check import refused


def run_loop(
    run: Run,
    start: StartingPoint,
    changed: tuple[Change, ...] = (),
    *,
    world_size: int,
    device: Device,
    stop: StopRequest,
    watch: HangWatch,
) -> None:
    """Train `run` with Megatron's loop; return at its end.

    Args:
        run: a resolved run, checked.
        start: starting point of the run.
        changed: settings and data that differ from the checkpoint's, default none.
        world_size: number of ranks.
        device: "cpu" or "cuda".
        stop: stop request of this rank, already listening.
        watch: hang watch of this rank, already watching.

    Raises:
        SystemExit: Megatron's way to leave the loop early, after a stop request and a save
            (training.py:4155, 0.19.2).
    """
    backend = run.resolved_backend(device)
    even_shares.activate(run.optimizer)
    # Megatron reads its arguments from nowhere else (training/arguments.py:parse_args, 0.19.2).
    sys.argv[1:] = megatron_arguments(
        run, world_size=world_size, device=device, backend=backend, start=start
    )
    container = pretrain_cfg_container_from_args(parse_arguments(run))
    parts, step = _loop_parts(run, stop, watch)
    metrics, rollouts = parts.metrics, parts.rollouts

    @functools.cache  # the provider is called once for each virtual pipeline stage
    def after_load() -> None:
        metrics.open()
        for change in changed:
            # At the first step that the change applies to, so that a resume from the same
            # checkpoint drops the line and writes its own.
            metrics.log_note(
                get_args().iteration + 1, f"changed: {change.line()} ({change.reason})"
            )
        parts.guard.load(output_folder(run), iteration=get_args().iteration)
        if rollouts is not None:
            rollouts.open(get_args().iteration)
        install_hooks(parts)

    provider: Callable[..., Any] = run_model_provider(run, backend, new=start.kind == "new")
    if rollouts is not None:
        provider = rollouts.wrap_provider(provider)
    try:
        pretrain(
            container,
            dataset_provider(
                run,
                after_load,
                lambda samples: parts.sums.open(samples, get_args().iteration),
                None if rollouts is None else rollouts.provide,
            ),
            ModelType.encoder_or_decoder,
            watch.count_micro_batches(parts.guard.wrap_forward_step(step)),
            # Not through the container: in 0.19.2 that path never lays parameters out for
            # layer-wise Muon (megatron/training/training.py:2040-2061), which then runs without
            # sharding its state.
            model_provider=metrics.wrap_provider(provider),
        )
    finally:
        metrics.close()
        if rollouts is not None:
            rollouts.close()


def _loop_parts(
    run: Run, stop: StopRequest, watch: HangWatch
) -> tuple[LoopParts, Callable[..., Any]]:
    """Build what this project adds to Megatron's loop, and the function of a forward step."""
    metrics = TrainingMetrics(run)
    data = check_data(run)
    names = tuple(source.name for source in data.valid) if len(data.valid) > 1 else ()
    sums = ValidationDocuments(
        run, corpora=[source.name for source in data.valid], folder=output_folder(run)
    )
    rollouts = None
    if run.data.feed == "rollouts":
        rollouts = RolloutTraining(run, metrics, watch.paused)
    step: Callable[..., Any] = functools.partial(
        forward_step,
        validation_sets=names,
        documents=data.document_attention,
        on_validation=sums.add if sums.active else None,
    )
    if rollouts is not None:
        step = rollouts.forward_step
    guard = StepGuard(run.stability, on_event=metrics.log_event)

    def add_files(folder: Path) -> None:
        """Write this project's own files into a checkpoint."""
        guard.save(folder)
        if rollouts is not None:
            rollouts.save(folder)
        write_text(folder / RUN_FILE, to_yaml(run))
        DataRecord.of(data).write(folder)

    parts = LoopParts(
        checkpoint=run.checkpoint,
        metrics=metrics,
        sums=sums,
        samples=TrainingSamples(run, on_texts=metrics.log_samples, pause_watch=watch.paused),
        tasks=TrainingTasks(run, on_scores=metrics.log_tasks, pause_watch=watch.paused),
        guard=guard,
        add_files=add_files,
        stop=stop,
        pause_watch=watch.paused,
        rollouts=rollouts,
    )
    return parts, step


def parse_arguments(run: Run) -> Namespace:
    """Read the command line with Megatron's parser and validation.

    Raises:
        InputError: a word of `execution.extra_arguments` is none of Megatron's; its parser would
            print its whole help and exit.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said) if run.execution.extra_arguments else nullcontext():
            arguments: Namespace = parse_and_validate_args()
    except SystemExit as error:
        raise refused(run, said.getvalue()) from error
    return arguments
