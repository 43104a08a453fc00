"""Watches the numbers of each training step and keeps updates out that should not happen
(`Stability`).

Megatron asks its rerun state machine about every micro-batch's loss and every gradient bucket,
before any of it is reduced over ranks (megatron/core/distributed/param_and_grad_buffer.py:339,
0.19.2), and the optimizer's `prepare_grads` whether the update can happen; where it says no, `step`
returns before anything is clipped or changed (core/optimizer/optimizer.py:1855). These are the two
places used here: what the machine would raise on is noted, and in `prepare_grads` all ranks tell
each other what they noted, so that all decide alike: one gather of four numbers a rank.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mellum2_megatron.checkpoint.folder import iteration_folder_name
from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.files import write_json
from mellum2_megatron.config import Stability
from mellum2_megatron.faults.loss_history import LossHistory

logger = logging.getLogger(__name__)

STATE_FILE = "stability.json"
"""In a checkpoint's folder: the losses of the last steps and how many updates were skipped one
after another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A step that went wrong.

    Attributes:
        step: its number, from 1.
        note: what was seen and what was done about it.
        value: the loss, or the norm of the gradient bucket in which it was seen.
        rank: the first that saw it; None where it is in all ranks' mean.
        samples: of the training, seen by the end of the step.
        batch_size: of the step.
        skipped: the update was left out.
    """

    step: int
    note: str
    value: float
    rank: int | None
    samples: int
    batch_size: int
    skipped: bool

    @property
    def values(self) -> dict[str, float]:
        """The numbers, for the log."""
        numbers = {
            "value": self.value,
            "samples": self.samples,
            "batch_size": self.batch_size,
            "skipped": self.skipped,
        }
        return {name: float(number) for name, number in numbers.items()} | (
            {} if self.rank is None else {"rank": float(self.rank)}
        )


class StepGuard:
    """Applies a run's `Stability` to Megatron's training steps on this rank.

    Args:
        settings: of the run.
        tell: called on every rank with each event.
    """

    def __init__(self, settings: Stability, tell: Callable[[Event], None]) -> None:
        self.settings = settings
        self._tell = tell
        self._history = LossHistory(window=settings.spike_window, factor=settings.spike_factor)
        self._in_a_row = 0
        self._installed = False
        self._optimizer: Any = None
        self._stepping = False
        self._skipped = False
        self._sums: torch.Tensor | None = (
            None  # [loss of all tokens, tokens] of this rank's micro-batches
        )
        self._not_finite = {"loss": 0.0, "gradient": 0.0}

    def install(self, checkpoints: Path) -> None:
        """Hook into Megatron's loop. Called once Megatron is set up and a checkpoint, if any, is
        loaded.

        Args:
            checkpoints: folder of the run; where it resumes, its checkpoint has what this guard
                knew then.
        """
        if not self.settings.is_watching or self._installed:
            return
        self._installed = True
        from megatron.core.rerun_state_machine import get_rerun_state_machine
        from megatron.training import get_args, training

        self._load(checkpoints / iteration_folder_name(get_args().iteration) / STATE_FILE)
        training.train_step = self._guarding(training.train_step)
        if self.settings.not_finite == "skip":
            machine = get_rerun_state_machine()
            machine.validate_result = self._noting(machine.validate_result)

    def watching(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a `forward_step` whose losses are looked at."""
        if not self.settings.is_watching:
            return forward_step

        @functools.wraps(forward_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            output, loss_function = forward_step(*args, **kwargs)
            return output, functools.partial(self._collect, loss_function)

        return step

    def save(self, folder: Path) -> None:
        """Write what a resume needs to know into a checkpoint's folder; one rank calls it."""
        if self.settings.is_watching:
            write_json(
                folder / STATE_FILE,
                {"losses": self._history.losses, "skipped_in_a_row": self._in_a_row},
            )

    def _load(self, file: Path) -> None:
        if not file.is_file():
            return  # a new run, one that continues another, or a checkpoint from before there was a guard
        state = json.loads(file.read_text(encoding="utf-8"))
        settings = self.settings
        self._history = LossHistory(
            window=settings.spike_window,
            factor=settings.spike_factor,
            losses=state["losses"][-settings.spike_window :],
        )
        self._in_a_row = int(state["skipped_in_a_row"])

    def _collect(self, loss_function: Callable[..., Any], output: torch.Tensor) -> Any:
        result = loss_function(output)
        if self._stepping:
            sums = result[2]["lm loss"].detach().double()
            self._sums = sums if self._sums is None else self._sums + sums
        return result

    def _noting(self, validate_result: Callable[..., None]) -> Callable[..., None]:
        """Wrap the rerun state machine's `validate_result`: inside a step it notes what it would
        raise on."""

        @functools.wraps(validate_result)
        def note(
            result: torch.Tensor,
            rejection_func: Callable[..., bool],
            message: str,
            *args: Any,
            **kw: Any,
        ) -> None:
            if not self._stepping:  # validation: there is no update to skip
                return validate_result(result, rejection_func, message, *args, **kw)
            kind = "gradient" if "grad" in message else "loss"
            if rejection_func(result) and not self._not_finite[kind]:
                self._not_finite[kind] = float(result)
            return None

        return note

    def _guarding(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `train_step`. After a skipped update it leaves the learning rate where it
        was; here the schedule goes on, so that the rate stays a function of the samples
        (training.py:2518, 0.19.2)."""

        @functools.wraps(train_step)
        def step(
            forward_step: Any,
            data_iterator: Any,
            model: Any,
            optimizer: Any,
            scheduler: Any,
            *rest: Any,
            **named: Any,
        ) -> Any:
            if self._optimizer is not optimizer:
                self._optimizer = optimizer
                optimizer.prepare_grads = self._deciding(optimizer.prepare_grads)
            self._stepping, self._skipped, self._sums = True, False, None
            self._not_finite = dict.fromkeys(self._not_finite, 0.0)
            try:
                result = train_step(
                    forward_step, data_iterator, model, optimizer, scheduler, *rest, **named
                )
            finally:
                self._stepping = False
            if self._skipped:
                scheduler.step(increment=_batch_size())
            return result

        return step

    def _deciding(self, prepare_grads: Callable[[], bool]) -> Callable[[], bool]:
        """Wrap the optimizer's `prepare_grads`, which says whether there is something that forbids
        the update."""

        @functools.wraps(prepare_grads)
        def prepare() -> bool:
            if self._stepping and self._judge():
                self._skipped = True
                return True
            return prepare_grads()

        return prepare

    def _judge(self) -> bool:
        """Return whether to skip this step's update. A collective of all ranks, with one result for
        all.

        Raises:
            WorkError: the run is to stop.
        """
        rows = self._gather()
        tokens = sum(row[1] for row in rows)
        loss = sum(row[0] for row in rows) / tokens if tokens else math.nan
        for column, what in ((2, "loss"), (3, "gradient")):
            bad = [rank for rank, row in enumerate(rows) if row[column]]
            if bad:
                value = rows[bad[0]][column]
                others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
                return self._act(
                    "skip", f"the {what} is {value} on rank {bad[0]}{others}", value, bad[0]
                )
        median = self._history.add(loss) if math.isfinite(loss) else None
        if median is None or self.settings.spike == "ignore":
            self._in_a_row = 0
            return False
        seen = f"the loss is {loss:.4f}, {loss / median:.2f} times the median of {self.settings.spike_window} steps"
        return self._act(self.settings.spike, seen, loss, None)

    def _act(self, action: str, seen: str, value: float, rank: int | None) -> bool:
        """Do what the settings say; return whether the update is skipped."""
        from megatron.training import get_args

        args, settings = get_args(), self.settings
        step, batch_size = args.curr_iteration + 1, _batch_size()
        self._in_a_row = self._in_a_row + 1 if action == "skip" else 0
        too_many = self._in_a_row > settings.max_skips
        ends = action == "stop" or too_many or (action == "skip" and step == 1)
        done = (
            "the run stops" if ends else "the update is skipped" if action == "skip" else "recorded"
        )
        event = Event(
            step=step, note=f"{seen}: {done}", value=value, rank=rank, samples=args.consumed_train_samples + batch_size,
            batch_size=batch_size, skipped=action == "skip" and not ends,
        )  # fmt: skip
        self._tell(event)
        if ends:
            why = f", after {settings.max_skips} skipped updates in a row" if too_many else ""
            raise WorkError(
                f"step {step}: {seen}{why}; nothing was saved after it",
                fix="look at the metrics and data before that step; go on from an earlier checkpoint with a lower "
                "optimizer.lr or a smaller optimizer.clip_grad, or see stability.max_skips and stability.spike",
            )
        return event.skipped

    def _gather(self) -> list[list[float]]:
        """Return what every rank saw: its tokens' loss, their number, and the first loss and
        gradient not finite."""
        sums = (
            torch.zeros(2, dtype=torch.float64, device="cuda") if self._sums is None else self._sums
        )
        noted = torch.tensor(list(self._not_finite.values()), dtype=torch.float64, device="cuda")
        own = torch.cat([sums, noted])
        rows = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(rows, own)
        gathered: list[list[float]] = torch.stack(rows).tolist()
        return gathered


def _batch_size() -> int:
    from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

    return int(get_current_running_global_batch_size())
