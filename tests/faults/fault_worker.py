"""Training of one rank with a fault on the way, for tests of checkpoints and faults."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def train(run_file: str) -> bool:
    """Train a resolved run on this rank; return whether it has ended."""
    from mellum2_megatron.checkpoint import read_run
    from mellum2_megatron.training.rank_main import train as train_run

    return train_run(read_run(Path(run_file)), device="cpu")


def reload(run_file: str, copy: str) -> bool:
    """Save what was loaded into the folder ``copy``, untouched by any step; then train."""
    from megatron.training import training
    from megatron.training.checkpointing import save_checkpoint

    loop = training.train

    def save_and_train(
        forward_step: Any, model: Any, optimizer: Any, scheduler: Any, *rest: Any, **named: Any
    ) -> Any:
        args = training.get_args()
        output, args.save = args.save, copy
        save_checkpoint(
            args.iteration, model, optimizer, scheduler, args.num_floating_point_operations_so_far
        )
        args.save = output
        return loop(forward_step, model, optimizer, scheduler, *rest, **named)

    training.train = save_and_train
    return train(run_file)


def count_reload(run_file: str, copy: str) -> tuple[int, int]:
    """Do the same; return the bytes of tensors that this rank read, and the saves that it planned.

    A save whose plan was kept counts as none.
    """
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.planner import LoadItemType

    read, planned = [], []
    data, plan = FileSystemReader.read_data, MCoreSavePlanner.create_local_plan

    def read_data(self: Any, wanted: Any, planner: Any) -> Any:
        read.extend(
            self.storage_data[item.storage_index].length
            for item in wanted.items
            if item.type == LoadItemType.TENSOR
        )
        return data(self, wanted, planner)

    def make_plan(self: Any) -> Any:
        planned.append(plan(self))
        return planned[-1]

    FileSystemReader.read_data = read_data
    MCoreSavePlanner.create_local_plan = make_plan
    assert reload(run_file, copy)
    return sum(read), len(planned)


def signalled(run_file: str, rank: int, step: int, number: int) -> bool:
    """Send one rank a signal in the middle of a step, after its first micro-batch."""

    def get(batch: dict[str, Any]) -> dict[str, Any]:
        os.kill(os.getpid(), number)
        return batch

    _on_batch(rank, step, get)
    return train(run_file)


def killed_in_save(run_file: str, rank: int, step: int) -> bool:
    """Kill one rank while it writes a step's checkpoint, between tensors ten and eleven."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    process, write, written = os.getpid(), filesystem_async._write_item, []

    @functools.wraps(write)  # its parameters are looked at
    def die(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        if int(os.environ["RANK"]) == rank and get_args().curr_iteration + 1 == step:
            written.append(step)
            if len(written) > 10:
                os.kill(process, signal.SIGKILL)
        return write(*args, **kwargs)

    filesystem_async._write_item = die
    return train(run_file)


def not_a_number(run_file: str, rank: int, step: int, where: str) -> bool:
    """Make the loss of a step, or only a gradient, NaN on one rank."""

    def spoil_loss(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "loss_mask": batch["loss_mask"] * float("nan")}

    def spoil_gradient(batch: dict[str, Any]) -> dict[str, Any]:
        from megatron.core.tensor_parallel import ColumnParallelLinear

        forward = ColumnParallelLinear.forward

        def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
            output, bias = forward(self, *args, **kwargs)
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient * float("nan"))
            return output, bias

        ColumnParallelLinear.forward = spoiled
        return batch

    _on_batch(rank, step, spoil_loss if where == "loss" else spoil_gradient)
    return train(run_file)


def bad_steps(run_file: str, rank: int, steps: list[int], what: str) -> bool:
    """In some steps make one rank's loss or only its gradient NaN, or triple its loss."""
    from mellum2_megatron.training import rollouts
    from mellum2_megatron.training import step as module

    sum_loss, sum_policy_loss = module.sum_loss, rollouts.sum_policy_loss

    def spoil(output: Any) -> Any:
        from megatron.training import get_args

        if (
            int(os.environ["RANK"]) == rank
            and get_args().curr_iteration + 1 in steps
            and output.requires_grad
        ):
            if what == "gradient":
                output.register_hook(lambda gradient: gradient * float("nan"))
            else:
                output = output * (float("nan") if what == "loss" else 3.0)
        return output

    def spoiled(loss_mask: Any, output: Any, **source: Any) -> Any:
        return sum_loss(loss_mask, spoil(output), **source)

    def spoiled_policy(batch: Any, settings: Any, output: Any) -> Any:
        return sum_policy_loss(batch, settings, spoil(output))

    rollouts.sum_policy_loss = spoiled_policy
    module.sum_loss = spoiled
    return train(run_file)


def _watch_once_others_wait(run_file: str, rank: int, *, answer: float = 3.0) -> Path:
    """Let limits of the watch hold when the other rank of two has waited for this one for a second.

    So they can be short, and no slow machine exceeds them before.

    Args:
        run_file: file of the run; two empty files lie beside it.
        rank: the rank that will hang.
        answer: seconds that a rank has to answer, default 3.

    Returns:
        The file to make when it hangs.
    """
    from mellum2_megatron.faults import hang_watch as watch

    watch._ANSWER_SECONDS = answer
    hangs, waits = (Path(run_file).with_name(name) for name in ("hangs", "waits"))
    limit = watch.HangWatch.limit.fget

    def held(self: watch.HangWatch) -> float:
        if self.rank != rank and hangs.exists():
            if not watch._place(sys._current_frames().get(self._main), 0).waiting:
                waits.unlink(missing_ok=True)
            elif not waits.exists():
                waits.touch()
        try:
            holds = time.time() - waits.stat().st_mtime > 1
        except FileNotFoundError:
            holds = False
        return float(limit(self)) if holds else 3600.0

    watch.HangWatch.limit = property(held)
    return hangs


def stuck(run_file: str, rank: int, step: int, how: str) -> bool:
    """Hang one rank in a step: it sleeps, or its process is stopped."""
    hangs = _watch_once_others_wait(run_file, rank, answer=1.0 if how == "stopped" else 3.0)

    def never_mind(batch: dict[str, Any]) -> dict[str, Any]:
        hangs.touch()
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(600)
        return batch

    _on_batch(rank, step, never_mind)
    return train(run_file)


def stuck_in_set_up(run_file: str, rank: int, where: str) -> bool:
    """Hang one rank before its first step: it waits for a checkpoint's file, or for its data."""
    from mellum2_megatron.data.feed import datasets

    hangs = _watch_once_others_wait(run_file, rank)

    def hang(*_: Any, **__: Any) -> None:
        hangs.touch()
        time.sleep(600)

    if int(os.environ["RANK"]) == rank:
        if where == "load":
            from megatron.core.dist_checkpointing import serialization

            serialization.load_common_state_dict = hang
        else:
            datasets._build = hang
    return train(run_file)


def limits_of_collectives(run_file: str) -> tuple[list[float], list[float]]:
    """Return the limits of collectives, seconds, in the first step and in the second one.

    The first list leaves out the default group, which this test and not Megatron has made.
    """
    from megatron.core import parallel_state

    from mellum2_megatron.training import step as module

    get_batch, seen = module.get_batch, {}

    def get(*args: Any) -> Any:
        import torch
        from megatron.training import get_args

        if get_args().curr_iteration < 2:
            groups = parallel_state._global_process_group_list[1:]
            if get_args().curr_iteration:
                groups = [torch.distributed.group.WORLD, *groups]
            seen[get_args().curr_iteration] = sorted(
                {
                    group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
                    for group in groups
                }
            )
        return get_batch(*args)

    module.get_batch = get
    train(run_file)
    return seen[0], seen[1]


def write_manifest(folder: str, later: bool) -> None:
    """Write a file on each rank as a save does (at once or in the background), and the manifest."""
    import torch

    from mellum2_megatron.checkpoint import saving

    def write() -> None:
        rank = torch.distributed.get_rank()
        for number in range(2):
            Path(folder, f"__{rank}_{number}.distcp").write_bytes(bytes([rank, number]) * 1000)
        torch.distributed.barrier()
        if rank == 0:
            Path(folder, ".metadata").write_text("all")
            Path(folder, "metadata.json").write_text("{}")

    def save(state: Any, folder: str) -> Any:
        if not later:
            return write()
        return SimpleNamespace(finalize_fns=[write, torch.distributed.barrier])

    request = saving.with_manifest(save, extra_save=lambda _: None)({}, folder)
    assert Path(folder, saving.MANIFEST_FILE).exists() is not later
    for finalize in request.finalize_fns if later else ():
        finalize()


def _on_batch(rank: int, step: int, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the first micro-batch of a step on one rank."""
    from mellum2_megatron.training import rollouts
    from mellum2_megatron.training import step as module

    get_batch, done = module.get_batch, []

    def get(*args: Any, **more: Any) -> Any:
        from megatron.training import get_args

        batch = get_batch(*args, **more)
        if int(os.environ["RANK"]) == rank and get_args().curr_iteration + 1 == step and not done:
            done.append(step)
            return change(batch)
        return batch

    module.get_batch = rollouts.get_batch = get
