"""Training on the model's own answers, inside Megatron's loop (`rollouts.trainer` has the order).

Three places of the loop differ from a training on data: the samples, which exist once the answers
of a step are written (`RolloutTraining.wrap_train_step`); the loss of a micro-batch
(`policy_step`); and the weights that are frozen (`RolloutTraining.wrap_provider`).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from torch.utils.data import Dataset

from mellum2_megatron.checkpoint import output_folder
from mellum2_megatron.checkpoint.folder import iteration_folder_name
from mellum2_megatron.data.feed.datasets import reads_data
from mellum2_megatron.model.router import Mellum2Router
from mellum2_megatron.rlvr.objective import policy_loss
from mellum2_megatron.rollouts.batch import ADVANTAGES, GENERATION
from mellum2_megatron.rollouts.prompts import run_tasks
from mellum2_megatron.rollouts.trainer import Rollouts, make_engine
from mellum2_megatron.training.decoding import outside_of_training
from mellum2_megatron.training.step import LOSS_CHECK, Batch, get_batch

if TYPE_CHECKING:
    from mellum2_megatron.config import Objective, Run
    from mellum2_megatron.training.metrics import TrainingMetrics

OUTSIDE_BAND, CLIPPED, KL = "rl/outside_band_share", "rl/clipped_share", "rl/kl"
"""Names in the log: shares of the tokens, and nats a token."""


class RolloutSamples(Dataset[dict[str, torch.Tensor]]):
    """The samples of all steps, numbered as in any training; only those of this step exist."""

    def __init__(self, rollouts: Rollouts, samples: int) -> None:
        self._rollouts, self._samples = rollouts, samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self._rollouts.batch
        assert batch is not None, "a step prepares its batch first"
        return batch.sample(index % batch.size)


class RolloutTraining:
    """The part of a run that makes its samples, on one rank.

    Args:
        run: a resolved run.
        metrics: log of the run.
        pause_watch: context manager in which the hang watch is off.
    """

    def __init__(
        self,
        run: Run,
        metrics: TrainingMetrics,
        pause_watch: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._run, self._metrics, self._pause_watch = run, metrics, pause_watch
        self._rollouts: Rollouts | None = None
        self._seconds = 0.0
        self.forward_step = functools.partial(policy_step, settings=run.rl.objective)

    @property
    def rollouts(self) -> Rollouts:
        """The answers; exist after `open`."""
        assert self._rollouts is not None
        return self._rollouts

    def open(self, iteration: int) -> None:
        """Read the tasks and make the engine; take over a checkpoint's queue.

        Args:
            iteration: steps of the checkpoint that is resumed, or 0.

        Raises:
            InputError: see `run_tasks` and `Rollouts.restore`.
        """
        run, folder = self._run, output_folder(self._run)
        tasks = run_tasks(run)
        self._rollouts = Rollouts(run, tasks, make_engine(run, tasks, folder))
        if iteration:
            self._rollouts.restore(folder / iteration_folder_name(iteration))

    def close(self) -> None:
        """End the engine."""
        if self._rollouts is not None:
            self._rollouts.close()

    def save(self, folder: Path) -> None:
        """Write the queue into a checkpoint's folder; one rank calls it."""
        self.rollouts.save(folder)

    def provide(self, samples: int, vp_stage: int | None) -> RolloutSamples | None:
        """Return the training set; None on ranks that read no data."""
        return RolloutSamples(self.rollouts, samples) if reads_data(vp_stage) else None

    def wrap_provider(self, provider: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a model provider: freeze the routers, where the run says so."""

        @functools.wraps(provider)
        def provide(*args: Any, **kwargs: Any) -> Any:
            model = provider(*args, **kwargs)
            if self._run.rl.freeze_router:
                for module in model.modules():
                    if isinstance(module, Mellum2Router):
                        module.weight.requires_grad_(False)
            return model

        return provide

    def wrap_train_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `train_step`: the answers of the step come first."""

        @functools.wraps(train_step)
        def step_on_answers(
            forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, *rest: Any, **kw: Any
        ) -> Any:
            version, begin = int(get_args().curr_iteration), time.monotonic()
            with self._pause_watch(), outside_of_training(model, optimizer):
                self._load(model, version)
                if version == 0:
                    self._validate(0)
                self.rollouts.prepare(version)
            self._seconds = time.monotonic() - begin
            return train_step(forward_step, data_iterator, model, optimizer, *rest, **kw)

        return step_on_answers

    def wrap_training_log(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `training_log`: queue what was written meanwhile, and log the step."""

        @functools.wraps(training_log)
        def log_after_answers(*args: Any, **kwargs: Any) -> Any:
            with self._pause_watch():
                numbers = self.rollouts.finish()
            self._metrics.more = numbers | {"rl/rollout_seconds": self._seconds}
            return training_log(*args, **kwargs)

        return log_after_answers

    def wrap_end_of_step(self, callbacks: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `post_training_step_callbacks`: validate where it is due."""

        @functools.wraps(callbacks)
        def end_step(model: Any, optimizer: Any, scheduler: Any, iteration: int, *a: Any) -> Any:
            result = callbacks(model, optimizer, scheduler, iteration, *a)
            last = iteration == self._run.schedule.train_steps
            if iteration % self._run.logging.eval_interval == 0 or last:
                with self._pause_watch(), outside_of_training(model, optimizer):
                    if self._run.rl.eval_answers:
                        self._load(model, iteration)
                    self._validate(iteration)
            return result

        return end_step

    def _load(self, model: Any, version: int) -> None:
        if self.rollouts.needs_weights(version):
            self.rollouts.load(model, version)

    def _validate(self, step: int) -> None:
        if self._run.rl.eval_answers:
            self._metrics.log_validation(step, self.rollouts.validate())


def policy_step(
    data_iterator: Iterator[Batch], model: torch.nn.Module, *_: Any, settings: Objective
) -> tuple[Any, functools.partial[Any]]:
    """Run one micro-batch of answers through this stage (Megatron's `forward_step_func`).

    Args:
        data_iterator: samples of this data-parallel rank.
        model: this stage.
        settings: the objective.

    Returns:
        Per-token loss `[b, s]`, minus the log-probability of each label, on the last stage (hidden
        states elsewhere), and the function that makes the policy's loss of it.
    """
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = get_batch(data_iterator, vp_stage, more=(GENERATION, ADVANTAGES))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, functools.partial(sum_policy_loss, batch, settings)


def sum_policy_loss(
    batch: Batch, settings: Objective, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the policy's loss over the tokens that count; Megatron divides by those of the step.

    A step is one update, so the log-probabilities before it are those of the forward pass itself.

    Args:
        batch: this rank's part of the micro-batch.
        settings: the objective.
        output: per-token loss `[b, s]`, nats.

    Returns:
        Loss sum, number of tokens, and sum and number for the log.

    Raises:
        InputError: a log-probability of generation that is not finite.
        RuntimeError: one of training that is not finite: the weights have diverged
            (``faults.failures.explained`` puts it in words). With ``stability.not_finite=skip`` the
            loss is NaN instead, and the update is skipped.
    """
    mask, generation, advantages = (batch[name] for name in ("loss_mask", GENERATION, ADVANTAGES))
    assert mask is not None
    assert generation is not None
    assert advantages is not None
    current = -output.view_as(mask).float()
    # The objective refuses such values as bad input, and its band would hide them.
    is_sound = bool(torch.where(mask.bool(), current, 0.0).isfinite().all())
    current = current if is_sound else current.nan_to_num()
    result = policy_loss(
        current, current.detach(), generation, mask, advantages[:, 0], settings, tokens=1.0
    )
    loss = result.loss if is_sound else result.loss * math.nan
    get_rerun_state_machine().validate_result(
        result=loss.detach(),
        rejection_func=lambda value: not value.isfinite(),
        message=LOSS_CHECK,
    )
    tokens = mask.sum().to(torch.int)
    sums = {
        "lm loss": loss.detach(),
        OUTSIDE_BAND: result.outside_band,
        CLIPPED: result.clipped_low + result.clipped_high,
        KL: result.kl,
    }
    log = {name: torch.stack([value.float(), tokens.float()]) for name, value in sums.items()}
    return loss, tokens, log
