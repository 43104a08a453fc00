"""What a training step looked like, taken from Megatron where it appears and handed to the run's
own log.

Megatron reports losses, learning rate and gradient norm to a TensorBoard writer on the last rank,
one scalar a call. `ScalarCapture` takes the writer's place; a wrapper around `training_log` says
when a step's scalars are complete.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mellum2_megatron.common.values import to_plain
from mellum2_megatron.metrics.log import MetricsLogger
from mellum2_megatron.model.router import Mellum2Router

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

    from mellum2_megatron.config import Run
    from mellum2_megatron.faults.step_guard import Event

NAMES = {
    "lm loss": "lm_loss",
    "mtp_1 loss": "mtp_loss",
    "global_load_balancing_loss": "aux_loss",
    "load_balancing_loss": "aux_loss",
    "seq_load_balancing_loss": "aux_loss",
    "z_loss": "z_loss",
    "learning-rate": "learning_rate",
    "grad-norm": "grad_norm",
    "batch-size": "batch_size",
    "iteration-time": "seconds_per_step",
}
"""Megatron's names of the scalars that are kept, and ours."""

VALIDATION_NAMES = {"lm loss validation": "lm_loss"}


class ScalarCapture:
    """Stands where Megatron expects a `SummaryWriter` and keeps the latest scalars by name."""

    def __init__(self, on_validation: Callable[[int, dict[str, float]], None]) -> None:
        self.values: dict[str, float] = {}
        self._on_validation = on_validation

    def add_scalar(
        self, tag: str, scalar_value: Any, global_step: int | None = None, *_: Any, **__: Any
    ) -> None:
        """Keep the value of a known name; a validation loss goes out at once."""
        if tag in NAMES:
            self.values[NAMES[tag]] = float(scalar_value)
        elif tag in VALIDATION_NAMES and global_step is not None:
            self._on_validation(global_step, {VALIDATION_NAMES[tag]: float(scalar_value)})

    def add_text(self, *_: Any, **__: Any) -> None:
        """Ignore: the arguments are in run.yaml."""

    def flush(self) -> None:
        """Do nothing: the run's log writes through."""


class TrainingMetrics:
    """The run's log, fed by Megatron's training loop.

    Args:
        run: the resolved run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._routers: list[Mellum2Router] = []
        self._log: MetricsLogger | None = None
        self._last_validation = -1

    def watching(self, provider: Callable[..., GPTModel]) -> Callable[..., GPTModel]:
        """Return `provider`, remembering the routers of every model part it builds."""

        @functools.wraps(provider)
        def provide(*args: Any, **kwargs: Any) -> GPTModel:
            model = provider(*args, **kwargs)
            self._routers += [
                module for module in model.modules() if isinstance(module, Mellum2Router)
            ]
            return model

        return provide

    def start(self) -> None:
        """Open the log and hook into the loop. Called once Megatron is set up and a checkpoint, if
        any, is loaded."""
        if self._log is not None:
            return
        from megatron.training import get_args, global_vars, training

        args = get_args()
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        logging, schedule = self.run.logging, self.run.schedule
        self._log = MetricsLogger(
            args.save,
            rank=world_size
            - 1
            - rank,  # Megatron has losses on the last pipeline stage, hence on the last rank
            world_size=world_size,
            run_name=logging.wandb_name or self.run.name,
            tensorboard=logging.tensorboard,
            wandb_project=logging.wandb_project,
            wandb_entity=logging.wandb_entity,
            config=to_plain(self.run),
            resume_step=args.iteration,
            total_steps=schedule.train_steps,
            total_samples=schedule.train_samples,
        )
        if self._log.last_step("valid") == args.iteration:
            self._last_validation = (
                args.iteration
            )  # a finished run started again has nothing to add
        capture = ScalarCapture(self._validated)
        if rank == world_size - 1:
            global_vars._GLOBAL_TENSORBOARD_WRITER = capture
        training.training_log = self._logging_steps(training.training_log, capture)

    def close(self) -> None:
        """Finish the log."""
        if self._log is not None:
            self._log.close()

    def event(self, event: Event) -> None:
        """Log what went wrong in a step, and what was done about it."""
        assert self._log is not None
        self._log.log_event(event.step, event.note, event.values)

    def _logging_steps(
        self, training_log: Callable[..., Any], capture: ScalarCapture
    ) -> Callable[..., Any]:
        """Wrap Megatron's `training_log`: it has no hook for the end of a step (training.py:2568,
        0.19.2)."""

        @functools.wraps(training_log)
        def log(
            loss_dict: Any,
            total_loss_dict: Any,
            learning_rate: Any,
            iteration: int,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            capture.values.pop(
                "grad_norm", None
            )  # a skipped update has none, and an earlier one's would stay
            result = training_log(
                loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs
            )
            if (
                iteration % self.run.logging.log_interval == 0
                or iteration == self.run.schedule.train_steps
            ):
                values = dict(capture.values) | self._expert_load()
                self._log_step(iteration, values)
            return result

        return log

    def _log_step(self, step: int, values: dict[str, float]) -> None:
        assert self._log is not None
        from megatron.training import get_args

        run = self.run
        values["samples"] = float(get_args().consumed_train_samples)
        values["tokens"] = values["samples"] * run.data.sequence_length
        seconds = values.get("seconds_per_step")
        if seconds:
            rate = values["batch_size"] * run.data.sequence_length / seconds
            flops = run.architecture.flops_per_token(run.data.sequence_length)
            values["tokens_per_second"] = rate
            values["model_tflops_per_second"] = rate * flops / 1e12
        self._log.log_step(step, values)

    def _validated(self, step: int, values: dict[str, float]) -> None:
        assert self._log is not None
        if step != self._last_validation:  # Megatron validates once more after the last step
            self._last_validation = step
            self._log.log_eval(step, values)

    def _expert_load(self) -> dict[str, float]:
        """Return the busiest and the idlest expert of each layer, as shares of an even load. A
        collective."""
        load: dict[str, float] = {}
        for router in self._routers:
            counts = router.last_global_load
            if counts is None or not counts.sum():
                continue
            layer = "mtp" if router.is_mtp_layer else f"layer_{router.layer_number - 1:02d}"
            shares = counts / counts.mean()
            load[f"expert_load/{layer}/max_over_mean"] = shares.max().item()
            load[f"expert_load/{layer}/min_over_mean"] = shares.min().item()
        from megatron.core import parallel_state

        stages = parallel_state.get_pipeline_model_parallel_world_size()
        if stages == 1:
            return load
        parts: list[dict[str, float]] = [{} for _ in range(stages)]
        torch.distributed.all_gather_object(
            parts, load, group=parallel_state.get_pipeline_model_parallel_group()
        )
        return {name: value for part in parts for name, value in part.items()}
