"""The starting point of a run: nothing, its own checkpoint, another run's state or its weights.

`StartingPoint.of` decides it once in a process. Rules, checks of the run folder, Megatron's
arguments and the main of each rank all use that one value.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mellum2_megatron.checkpoint.folder import (
    TRACKER_FILE,
    CheckpointFolder,
    find_checkpoint,
)
from mellum2_megatron.checkpoint.resume_keys import Change, changes
from mellum2_megatron.checkpoint.run_folder import checkpoint_run_file, read_run
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run

Kind = Literal["new", "resume", "continue", "weights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """The checkpoint that a run loads, and the run that wrote the checkpoint.

    Attributes:
        kind: ``new``: random weights. ``resume``: all state of the newest checkpoint in the run's
            own folder. ``continue``: all state of another run (`checkpoint.continue_from`).
            ``weights``: weights only (`checkpoint.load`).
        folder: value of the run's key for this kind, such as `checkpoint.load`; None for a new run.
        checkpoint: checkpoint in ``folder``; None for a new run, or with a ``checkpoint_error``.
        before: run that wrote the checkpoint, from the `run.yaml` in it, or beside one of an older
            version; None without that file (an import), or with a ``before_error``.
        checkpoint_error: error of a ``folder`` without usable checkpoint; None: no error.
        before_error: error of reading `run.yaml`; None: no error.
    """

    kind: Kind
    folder: Path | None = None
    checkpoint: CheckpointFolder | None = None
    before: Run | None = None
    checkpoint_error: InputError | None = None
    before_error: InputError | None = None

    @classmethod
    def of(cls, run: Run) -> StartingPoint:
        """Find the starting point of a run on this machine's disks.

        Errors are kept in the value, not raised. A check raises the error that concerns it, at its
        own place in the order of checks.

        Every rank calls this for itself. All get the same result, because no rank writes a
        checkpoint before all ranks have called it.
        """
        settings = run.checkpoint
        kind: Kind
        # The run's own checkpoint comes first; other folders only serve its first start.
        if settings.output is not None and (Path(settings.output) / TRACKER_FILE).is_file():
            kind, folder = "resume", Path(settings.output)
        elif settings.continue_from is not None:
            kind, folder = "continue", Path(settings.continue_from)
        elif settings.load is not None:
            kind, folder = "weights", Path(settings.load)
        else:
            return cls(kind="new")

        checkpoint = before = checkpoint_error = before_error = None
        try:
            checkpoint = find_checkpoint(folder)
        except InputError as error:
            checkpoint_error = error
        root = folder if checkpoint is None else checkpoint.root
        # Without checkpoint and tracker, run.yaml belongs to a run that never saved: nothing of it
        # is loaded. With a broken tracker it belongs to a run that did.
        has_saved = checkpoint is not None or (root / TRACKER_FILE).is_file()
        file = checkpoint_run_file(root, None if checkpoint is None else checkpoint.iteration)
        if has_saved and file is not None:
            try:
                before = read_run(file)
            except InputError as error:
                before_error = error
        return cls(
            kind=kind,
            folder=folder,
            checkpoint=checkpoint,
            before=before,
            checkpoint_error=checkpoint_error,
            before_error=before_error,
        )

    @property
    def has_state(self) -> bool:
        """True if the run takes over optimizer state and step count, not weights alone."""
        return self.kind in ("resume", "continue")

    @property
    def names_iteration(self) -> bool:
        """True if `folder` is a single ``iter_*`` or ``release``, not a whole run folder."""
        if self.folder is None or self.checkpoint is None:
            return False
        # abspath, not resolve, because `find_checkpoint` does not follow links either.
        return self.checkpoint.root != Path(os.path.abspath(self.folder))

    @property
    def step(self) -> int | None:
        """Step of the loaded training state; None if only weights, or nothing, are loaded."""
        if not self.has_state or self.checkpoint is None:
            return None
        return self.checkpoint.iteration

    @property
    def samples(self) -> int | None:
        """Samples that the loaded training state has seen; None if it is not recorded."""
        if self.step is None or self.before is None:
            return None
        return self.before.schedule.samples(self.step)

    def joined(self, run: Run) -> Run:
        """Return the run with the batches that the steps before a resume had.

        A new batch size then holds from the checkpoint on, and samples left make the steps left.
        A run that does not resume its own folder comes back unchanged: one that continues another
        must agree with its batches (`check_run_folder`).

        Raises:
            InputError: the run ends before the checkpoint, or not after a whole step.
        """
        if self.kind != "resume" or self.before is None or not self.samples:
            return run
        if self.before.architecture != run.architecture:
            return run  # refused by `check_run_folder`, a more basic mistake than a length
        schedule = run.schedule.after(self.before.schedule, self.samples)
        return dataclasses.replace(run, schedule=schedule)

    def changes(self, run: Run) -> tuple[Change, ...]:
        """Return the settings that differ from those of the state that ``run`` takes over."""
        if not self.has_state or self.before is None:
            return ()
        return changes(self.before, run, phase=self.kind == "continue")

    def require_checkpoint(self) -> CheckpointFolder:
        """Return the checkpoint of a run that is not new.

        Raises:
            InputError: there is no usable checkpoint.
        """
        if self.checkpoint_error is not None:
            raise self.checkpoint_error
        assert self.checkpoint is not None, "a new run loads no checkpoint"
        return self.checkpoint

    def line(self, run: Run) -> str:
        """Return the first line that a run prints: its starting point, after all checks."""
        if self.kind == "new":
            return f"{run.name} starts anew in {run.checkpoint.output}"
        checkpoint = self.require_checkpoint()
        # A release has weights only, also in the run's own folder.
        if self.kind == "weights" or checkpoint.iteration is None:
            return f"{run.name} takes the weights of {checkpoint.iteration_dir}"
        if self.kind == "resume":
            return f"{run.name} resumes step {checkpoint.iteration:,} of {self.folder}"
        return f"{run.name} continues {self.folder} after step {checkpoint.iteration:,}"
