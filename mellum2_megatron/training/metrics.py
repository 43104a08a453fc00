"""Metrics of each step: captured when Megatron reports them, and written to the run's log.

On the last rank Megatron reports losses, learning rate and gradient norm to a TensorBoard writer,
one scalar a call. `ScalarCapture` takes the writer's place. `training_log`, which reports them, is
wrapped (``hooks.hooks``): when it returns, a step's scalars are complete.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.training import get_args

from mellum2_megatron.architecture import MOST_MTP_LAYERS
from mellum2_megatron.common.values import to_plain
from mellum2_megatron.metrics import MetricsLogger
from mellum2_megatron.model.router import Mellum2Router
from mellum2_megatron.model.router_variants import VariantRouter
from mellum2_megatron.planning.memory import HOTTEST_LOAD

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

    from mellum2_megatron.config import Run
    from mellum2_megatron.evaluation import Outcome
    from mellum2_megatron.faults.step_guard import Event

ACCEPTANCE = {
    f"mtp_{depth}_acceptance_rate": f"mtp_{depth}_acceptance" if depth > 1 else "mtp_acceptance"
    for depth in range(1, MOST_MTP_LAYERS + 1)
}
"""Megatron's names of the share of tokens that each MTP layer predicts, in percent."""

NAMES = {
    "lm loss": "lm_loss",
    **{
        f"mtp_{depth} loss": f"mtp_{depth}_loss" if depth > 1 else "mtp_loss"
        for depth in range(1, MOST_MTP_LAYERS + 1)
    },
    **ACCEPTANCE,
    "global_load_balancing_loss": "aux_loss",
    "load_balancing_loss": "aux_loss",
    "seq_load_balancing_loss": "aux_loss",
    "z_loss": "z_loss",
    "learning-rate": "learning_rate",
    "grad-norm": "grad_norm",
    "batch-size": "batch_size",
    "iteration-time": "seconds_per_step",
}
"""Megatron's name of each scalar that is kept -> its name in the log."""

HOTTEST_RANK = "expert_load/hottest_rank_over_mean"
"""Tokens that the busiest rank of an expert-parallel group gets, over the group's mean: the mean
over the layers of a pipeline stage, whose activations exist together; of the worst stage."""

HOT_RANK = 1 + 0.8 * (HOTTEST_LOAD - 1)
"""Load of the hottest rank above which an event is logged: four fifths of the room that the count
of memory leaves. No expert drops a token, so activations of experts grow with this load."""

ROLLOUTS = "rl/"
"""Beginning of the names that a run on its own answers logs; they are the log's too."""

VALIDATION_LOSS = "lm loss validation"
"""Megatron's name of the validation loss. Those of its sources, `lm loss/NAME validation`, come
before it (`step.sum_loss`)."""


class ScalarCapture:
    """Stand-in for Megatron's `SummaryWriter` that keeps the latest scalars by name.

    Args:
        on_validation: called with step and values when a validation loss arrives.
    """

    def __init__(self, on_validation: Callable[[int, dict[str, float]], None]) -> None:
        self.values: dict[str, float] = {}
        self._of_sources: dict[str, float] = {}
        self._on_validation = on_validation

    def add_scalar(
        self, tag: str, scalar_value: Any, global_step: int | None = None, *_: Any, **__: Any
    ) -> None:
        """Keep the value of a known name; hand on a validation loss at once."""
        if tag in ACCEPTANCE:
            self.values[NAMES[tag]] = float(scalar_value) / 100
        elif tag in NAMES or (tag.startswith(ROLLOUTS) and " " not in tag):
            self.values[NAMES.get(tag, tag)] = float(scalar_value)
        elif tag == VALIDATION_LOSS and global_step is not None:
            self._on_validation(global_step, {"lm_loss": float(scalar_value), **self._of_sources})
        elif tag.startswith("lm loss/") and tag.endswith(" validation"):
            name = tag.removeprefix("lm loss/").removesuffix(" validation")
            self._of_sources[f"lm_loss/{name}"] = float(scalar_value)

    def add_text(self, *_: Any, **__: Any) -> None:
        """Ignore: the arguments are in run.yaml."""

    def flush(self) -> None:
        """Do nothing: the run's log writes through."""


class TrainingMetrics:
    """Log of the run, fed by Megatron's training loop.

    Args:
        run: a resolved run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._routers: list[Mellum2Router] = []
        self._log: MetricsLogger | None = None
        self.more: dict[str, float] = {}
        """Further numbers of the next step that is logged."""
        self._last_validation = -1
        self._alarm_above = HOT_RANK
        self._capture = ScalarCapture(self.log_validation)

    @property
    def log(self) -> MetricsLogger:
        """The log; exists after `open`."""
        assert self._log is not None
        return self._log

    def wrap_provider(self, provider: Callable[..., GPTModel]) -> Callable[..., GPTModel]:
        """Wrap a model provider: collect the routers of every model part that it builds."""

        @functools.wraps(provider)
        def provide(*args: Any, **kwargs: Any) -> GPTModel:
            model = provider(*args, **kwargs)
            self._routers += [
                module for module in model.modules() if isinstance(module, Mellum2Router)
            ]
            return model

        return provide

    def open(self) -> None:
        """Open the log; call it after a checkpoint, if any, is restored: its step is needed."""
        args = get_args()
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        logging, schedule = self.run.logging, self.run.schedule
        self._log = MetricsLogger(
            args.save,
            # The log's rank 0 writes. Megatron has losses on the last pipeline stage only, hence
            # on the last rank.
            rank=world_size - 1 - rank,
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
            # Megatron validates a finished run again when it is started again.
            self._last_validation = args.iteration

    def close(self) -> None:
        """Close the log, if it was opened."""
        if self._log is not None:
            self._log.close()

    def log_event(self, event: Event) -> None:
        """Log a step that went wrong, and the action taken."""
        self.log.log_event(event.step, event.note, event.values)

    def log_samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """Log the texts that the model generated after a step."""
        self.log.log_samples(step, texts)

    def log_tasks(self, step: int, outcomes: Mapping[str, Outcome]) -> None:
        """Log the scores of tasks after a step, such as ``arithmetic/+/found``."""
        self.log.log_tasks(
            step,
            {
                "/".join((name, *map(str, figure.where.values()), figure.name)): figure.value
                for name, outcome in outcomes.items()
                for figure in outcome.figures
            },
        )

    def log_note(self, step: int, note: str) -> None:
        """Log an event that has no numbers."""
        self.log.log_event(step, note, {})

    def replace_writer(self, writer: object | None) -> object | None:
        """Return the capture on the last rank, whose writer alone Megatron uses; else `writer`."""
        is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        return self._capture if is_last else writer

    def wrap_training_log(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `training_log`, which it calls at the end of each step on every rank."""

        @functools.wraps(training_log)
        def log_step(
            loss_dict: Any,
            total_loss_dict: Any,
            learning_rate: Any,
            iteration: int,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            # A skipped update reports no gradient norm; an earlier step's would be logged again.
            self._capture.values.pop("grad_norm", None)
            result = training_log(
                loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs
            )
            run = self.run
            is_logged = self._is_logged(iteration)
            for router in self._routers:
                router.end_batch(publish=is_logged)
            if not is_logged:
                return result
            values = self._capture.values | self._expert_load()
            values["samples"] = float(get_args().consumed_train_samples)
            values["tokens"] = values["samples"] * run.data.sequence_length
            seconds = values.get("seconds_per_step")
            if seconds:
                rate = values["batch_size"] * run.data.sequence_length / seconds
                flops = run.architecture.flops_per_token(run.data.sequence_length)
                values["tokens_per_second"] = rate
                values["model_tflops_per_second"] = rate * flops / 1e12
            values |= self.more
            self.log.log_step(iteration, values)
            self._watch_hottest_rank(iteration, values.get(HOTTEST_RANK, 0.0))
            return result

        return log_step

    def wrap_acceptance(self, count: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `_compute_mtp_acceptance_counts`: 0 of 0 in a step that is not logged.

        It takes the largest of all logits of a micro-batch, and Megatron calls it for each.
        """

        @functools.wraps(count)
        def count_if_logged(
            mtp_logits: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if self._is_logged(get_args().curr_iteration + 1):
                counts: tuple[torch.Tensor, torch.Tensor] = count(mtp_logits, *args, **kwargs)
                return counts
            nothing = torch.zeros((), device=mtp_logits.device)
            return nothing, nothing

        return count_if_logged

    def _is_logged(self, step: int) -> bool:
        """Return true if the metrics of this step, from 1, are logged."""
        run = self.run
        return step % run.logging.log_interval == 0 or step == run.schedule.train_steps

    def log_validation(self, step: int, values: dict[str, float]) -> None:
        """Log a validation, once: Megatron validates again after the last step."""
        if step != self._last_validation:
            self._last_validation = step
            self.log.log_eval(step, values)

    def _expert_load(self) -> dict[str, float]:
        """Return load of the busiest and idlest expert of each layer, relative to an even load.

        With a capacity also the share of the chosen experts that had no room, and with expert
        parallelism `HOTTEST_RANK`. Counts are those of a whole step on all ranks.

        A collective of the pipeline stages, each of which has its own layers.
        """
        load: dict[str, float] = {}
        ranks = parallel_state.get_expert_model_parallel_world_size()
        loads_of_ranks: list[torch.Tensor] = []
        for router in self._routers:
            counts = router.last_global_load
            if counts is None or not counts.sum():
                continue
            layer = "mtp" if router.is_mtp_layer else f"layer_{router.layer_number - 1:02d}"
            shares = counts / counts.mean()
            load[f"expert_load/{layer}/max_over_mean"] = shares.max().item()
            load[f"expert_load/{layer}/min_over_mean"] = shares.min().item()
            # Each rank holds experts with neighbouring numbers.
            loads_of_ranks.append(shares.view(ranks, -1).mean(dim=1))
            if isinstance(router, VariantRouter) and router.last_dropped_share is not None:
                load[f"expert_load/{layer}/dropped_share"] = router.last_dropped_share
        if ranks > 1 and loads_of_ranks:
            load[HOTTEST_RANK] = torch.stack(loads_of_ranks).mean(dim=0).max().item()
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        if stages == 1:
            return load
        parts: list[dict[str, float]] = [{} for _ in range(stages)]
        torch.distributed.all_gather_object(
            parts, load, group=parallel_state.get_pipeline_model_parallel_group()
        )
        merged = {name: value for part in parts for name, value in part.items()}
        hottest = [part[HOTTEST_RANK] for part in parts if HOTTEST_RANK in part]
        return merged | ({HOTTEST_RANK: max(hottest)} if hottest else {})

    def _watch_hottest_rank(self, step: int, load: float) -> None:
        """Log an event if the hottest rank is above `HOT_RANK`, and again when it grows by 10%."""
        if load <= self._alarm_above:
            return
        self._alarm_above = 1.1 * load
        self.log.log_event(
            step,
            f"one rank's experts get {load:.2f} times the mean number of tokens, and their "
            "activations take as much more memory: before it runs out, use execution.recompute, a "
            "smaller schedule.micro_batch_size, or loss.aux_loss_gradient=exact",
            {"hottest_rank_over_mean": load},
        )
