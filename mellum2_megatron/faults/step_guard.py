"""Skips or stops an optimizer step with non-finite values or a loss spike (`Stability`).

Two functions of Megatron's step are wrapped (``training/hooks.py`` installs the wrappers):

- `validate_result` gets every micro-batch's loss and every gradient bucket, before they are reduced
  over ranks (megatron/core/distributed/param_and_grad_buffer.py:339, 0.19.2). Wrapped, it records a
  non-finite value instead of raising.
- `prepare_grads` is the last point before the optimizer changes anything
  (core/optimizer/optimizer.py:1862). Wrapped, it gathers all ranks' records, so that all decide
  alike, and returns True to skip the update.

The gather of four numbers per rank is the only communication added to a step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mellum2_megatron.checkpoint.folder import iteration_folder_name
from mellum2_megatron.common.errors import InputError, WorkError, first_line
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.config import Stability
from mellum2_megatron.faults.failures import is_gradient_check
from mellum2_megatron.faults.loss_history import LossHistory

STATE_FILE = "stability.json"
"""In a checkpoint's folder: losses of the last steps, and number of updates skipped in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A step that went wrong.

    Attributes:
        step: step number, from 1.
        note: the finding and the action taken.
        value: the bad loss, or norm of a gradient bucket.
        rank: first rank with a bad value; None where `value` is a mean over all ranks.
        samples: training samples consumed by the end of the step.
        batch_size: samples in the step.
        skipped: True if the update was skipped.
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
        """The numeric attributes, in the form that the log takes."""
        numbers = {
            "value": float(self.value),
            "samples": float(self.samples),
            "batch_size": float(self.batch_size),
            "skipped": float(self.skipped),
        }
        if self.rank is not None:
            numbers["rank"] = float(self.rank)
        return numbers


@dataclass(kw_only=True, slots=True)
class _StepRecord:
    """Findings of this rank about the step in progress.

    Attributes:
        loss_sums: [loss of all tokens in nats, tokens] of this rank's micro-batches; None on a
            pipeline stage without a loss.
        not_finite: first non-finite value of each kind; 0 for none.
        judged: True once the ranks have decided about this step.
        skipped: True if they decided to skip the update.
    """

    loss_sums: torch.Tensor | None = None
    not_finite: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "gradient": 0.0})
    judged: bool = False
    skipped: bool = False


class StepGuard:
    """Applies a run's `Stability` to Megatron's training steps on this rank.

    Args:
        settings: stability settings of the run.
        on_event: called on every rank with each event.
    """

    def __init__(self, settings: Stability, on_event: Callable[[Event], None]) -> None:
        self.settings = settings
        self._on_event = on_event
        self._history = LossHistory(window=settings.spike_window, factor=settings.spike_factor)
        self._skips_in_a_row = 0
        self._step: _StepRecord | None = None  # None outside a step, as in validation

    def load(self, checkpoints: Path, *, iteration: int) -> None:
        """Restore the state that `save` wrote into the checkpoint of this iteration, if any.

        Args:
            checkpoints: output folder of the run.
            iteration: number of the checkpoint.
        """
        file = checkpoints / iteration_folder_name(iteration) / STATE_FILE
        # A new run has no such file, nor one that continues another run, nor an old checkpoint.
        if not self.settings.is_watching or not file.is_file():
            return
        try:
            state = load_json(file)
            losses = [float(loss) for loss in state["losses"]]
            skips = int(state["skipped_in_a_row"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                str(file),
                rule=f"it must hold the losses before the checkpoint ({first_line(error)})",
                fix="copy the checkpoint again, or remove the file: the history then starts anew",
            ) from error
        window = self.settings.spike_window  # may be smaller now than when the state was saved
        self._history = LossHistory(
            window=window, factor=self.settings.spike_factor, losses=losses[-window:]
        )
        self._skips_in_a_row = skips

    def save(self, folder: Path) -> None:
        """Write the state that a resume needs into a checkpoint's folder; one rank calls it."""
        if self.settings.is_watching:
            state = {"losses": self._history.losses, "skipped_in_a_row": self._skips_in_a_row}
            write_json(folder / STATE_FILE, state)

    def wrap_forward_step(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap our `forward_step`: record the loss of each micro-batch of a training step."""
        if not self.settings.is_watching:
            return forward_step

        @functools.wraps(forward_step)
        def recording_step(*args: Any, **kwargs: Any) -> Any:
            output, loss_function = forward_step(*args, **kwargs)

            def recording_loss(output: torch.Tensor) -> Any:
                result = loss_function(output)
                if self._step is not None:
                    # FP64: summed over micro-batches here and over ranks later.
                    sums = result[2]["lm loss"].detach().double()
                    before = self._step.loss_sums
                    self._step.loss_sums = sums if before is None else before + sums
                return result

            return output, recording_loss

        return recording_step

    def wrap_train_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `train_step`: record it, and advance the schedule after a skip.

        Megatron advances the learning-rate schedule only after an update (training.py:2518,
        0.19.2). Here it advances after a skipped one too: the rate stays a function of the samples.
        """
        if not self.settings.is_watching:
            return train_step

        @functools.wraps(train_step)
        def guarded_step(
            forward_step: Any,
            data_iterator: Any,
            model: Any,
            optimizer: Any,
            scheduler: Any,
            *rest: Any,
            **named: Any,
        ) -> Any:
            self._step = step = _StepRecord()
            try:
                result = train_step(
                    forward_step, data_iterator, model, optimizer, scheduler, *rest, **named
                )
            finally:
                self._step = None
            if step.skipped:
                scheduler.step(increment=_batch_size())
            return result

        return guarded_step

    def wrap_validate_result(self, validate_result: Callable[..., None]) -> Callable[..., None]:
        """Wrap `RerunStateMachine.validate_result`: record a bad value of a step, do not raise."""
        if self.settings.not_finite != "skip":
            return validate_result

        @functools.wraps(validate_result)
        def record_result(
            machine: Any,
            result: torch.Tensor,
            rejection_func: Callable[..., bool],
            message: str,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            if self._step is None:  # validation: there is no update to skip
                return validate_result(machine, result, rejection_func, message, *args, **kwargs)
            kind = "gradient" if is_gradient_check(message) else "loss"
            if rejection_func(result) and not self._step.not_finite[kind]:
                self._step.not_finite[kind] = float(result)
            return None

        return record_result

    def wrap_prepare_grads(self, prepare_grads: Callable[[Any], bool]) -> Callable[[Any], bool]:
        """Wrap `ChainedOptimizer.prepare_grads`: return True if the update must be skipped."""
        if not self.settings.is_watching:
            return prepare_grads

        @functools.wraps(prepare_grads)
        def prepare_or_skip(optimizer: Any) -> bool:
            step = self._step
            # With Muon and Adam one chained optimizer holds another: the outer one is called
            # first, and decides for both.
            if step is None or step.judged:
                return prepare_grads(optimizer)
            step.judged = True
            step.skipped = self._decide(step)
            return step.skipped or prepare_grads(optimizer)

        return prepare_or_skip

    def _decide(self, step: _StepRecord) -> bool:
        """Return True if this step's update must be skipped; a collective with one result.

        Raises:
            WorkError: the run must stop.
        """
        sums = step.loss_sums
        if sums is None:
            sums = torch.zeros(2, dtype=torch.float64, device="cuda")
        not_finite = list(step.not_finite.values())
        own = torch.cat([sums, torch.tensor(not_finite, dtype=torch.float64, device="cuda")])
        gathered = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, own)
        # A row for each rank: loss sum, tokens, first non-finite loss, first non-finite gradient.
        rows: list[list[float]] = torch.stack(gathered).tolist()

        for column, kind in ((2, "loss"), (3, "gradient")):
            ranks = [rank for rank, row in enumerate(rows) if row[column]]
            if ranks:
                value = rows[ranks[0]][column]
                more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
                finding = f"the {kind} is {value} on rank {ranks[0]}{more}"
                return self._apply("skip", finding, value, ranks[0])

        # Tensor-parallel ranks repeat the same sums and tokens, which does not change the mean.
        tokens = sum(row[1] for row in rows)
        loss = sum(row[0] for row in rows) / tokens if tokens else math.nan
        median = self._history.add(loss) if math.isfinite(loss) else None
        if median is None or self.settings.spike == "ignore":
            self._skips_in_a_row = 0
            return False
        finding = (
            f"the loss is {loss:.4f}, {loss / median:.2f} times the median of "
            f"{self.settings.spike_window} steps"
        )
        return self._apply(self.settings.spike, finding, loss, None)

    def _apply(self, action: str, finding: str, value: float, rank: int | None) -> bool:
        """Take an action ("record", "skip", "stop"): log it, and return True to skip the update.

        Raises:
            WorkError: the action is to stop, or the update cannot be skipped.
        """
        from megatron.training import get_args

        args, settings = get_args(), self.settings
        step, batch_size = args.curr_iteration + 1, _batch_size()
        self._skips_in_a_row = self._skips_in_a_row + 1 if action == "skip" else 0
        too_many = self._skips_in_a_row > settings.max_skips
        # The first update of a run cannot be skipped: an optimizer without state cannot be saved.
        stops = action == "stop" or too_many or (action == "skip" and step == 1)
        if stops:
            outcome = "the run stops"
        elif action == "skip":
            outcome = "the update is skipped"
        else:
            outcome = "recorded"
        event = Event(
            step=step,
            note=f"{finding}: {outcome}",
            value=value,
            rank=rank,
            samples=args.consumed_train_samples + batch_size,
            batch_size=batch_size,
            skipped=action == "skip" and not stops,
        )
        self._on_event(event)
        if stops:
            after = f", after {settings.max_skips} skipped updates in a row" if too_many else ""
            raise WorkError(
                f"step {step}: {finding}{after}; nothing was saved after it",
                fix="look at the metrics and data before that step; resume from an earlier "
                "checkpoint with a lower optimizer.lr or a smaller optimizer.clip_grad, or see "
                "stability.max_skips and stability.spike",
            )
        return event.skipped


def _batch_size() -> int:
    """Return the number of samples in a step now; it changes during a batch ramp."""
    from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

    return int(get_current_running_global_batch_size())
