"""The main of every rank: a resolved run becomes Megatron's own `pretrain`.

    torchrun --nproc-per-node 2 -m mellum2_megatron.train runs/tiny/run.yaml --device cpu

`mellum2 train` checks the run, writes the file and starts this; the file is the whole truth of the run.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mellum2_megatron.checkpoint_folder import resume_folder, tracked_iteration
from mellum2_megatron.errors import WorkError
from mellum2_megatron.failures import explained, is_echo, only_complete_checkpoints, report_failure
from mellum2_megatron.megatron_args import environment, megatron_arguments
from mellum2_megatron.provenance import record
from mellum2_megatron.rules import enforce
from mellum2_megatron.run import Device, Run
from mellum2_megatron.run_folder import check_run_folder, check_share, output_folder, read_run, write_run_folder
from mellum2_megatron.saving import remove_fragments
from mellum2_megatron.stopping import STOPPED, StopRequest
from mellum2_megatron.watch import Watch, default_store

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor | None"]

_ECHO_SECONDS = 5.0
"""A rank that failed because of another one waits so long, so that the other's reason is the one that is reported."""

_TEXT = ("tokens", "labels", "loss_mask", "position_ids")


def main(argv: list[str] | None = None) -> int:
    """Train the run of a YAML file in this process, one rank of `WORLD_SIZE`.

    Returns:
        0, or `STOPPED` (75) after a signal and a save. A failure ends the process: 2 for bad input, 1 at work
        (`failures.report_failure` says which).
    """
    parser = argparse.ArgumentParser(prog="python -m mellum2_megatron.train", description=main.__doc__)
    parser.add_argument("run", type=Path, help="resolved run, as `mellum2 train` writes it")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--verbose", action="store_true", help="keep Megatron's own output, and print tracebacks")
    parser.add_argument("--to-launcher", action="store_true", help="leave what ended this rank to the launcher to tell")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends a rank at once, even inside a collective
    try:
        done = train(
            read_run(options.run), device=options.device, verbose=options.verbose, to_launcher=options.to_launcher
        )
        import torch

        torch.distributed.destroy_process_group()
        if not done:
            _end(STOPPED)  # at once: a signal that the launcher still sends would be taken for the reason
    except SystemExit:
        raise
    except BaseException as error:  # a failed save is no Exception (torch/distributed/checkpoint/api.py, 2.15)
        code = report_failure(error, to_launcher=options.to_launcher, verbose=options.verbose)
        if is_echo(error):
            time.sleep(_ECHO_SECONDS)
        _end(code)
    return 0


def _end(code: int) -> NoReturn:
    """End this process; not by sys.exit, since at exit threads and process groups may wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train(run: Run, *, device: Device, verbose: bool = False, to_launcher: bool = False) -> bool:
    """Train `run` in this process; torchrun's environment says which rank it is.

    Args:
        run: a resolved run.
        device: what to compute on; "cpu" activates the CPU backend.
        verbose: let Megatron print what it prints.
        to_launcher: see `failures.report_failure`.

    Returns:
        Whether the run has ended; False if it was told to stop, and has saved what there is.

    Raises:
        InputError: the run cannot work as it is.
        WorkError: it failed on the way.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    enforce(run, world_size=world_size, device=device)
    check_run_folder(run)
    check_share(run, rank=rank, world_size=world_size)
    os.environ.update(environment(run))
    _activate(device, verbose)
    output, stop = output_folder(run), StopRequest()
    stop.listen()
    watch = _watch(run, rank, world_size, to_launcher=to_launcher)
    if rank == 0:
        remove_fragments(output)
        write_run_folder(run)
        resumed = tracked_iteration(Path(resume_folder(str(output), run.checkpoint.continue_from)))
        record(output, event="start", world_size=world_size, from_step=resumed, more={"device": device})
    with only_complete_checkpoints(output) if rank == 0 else nullcontext(), explained(output):
        try:
            _pretrain(run, world_size, device, stop, watch)
        except SystemExit as end:  # the way in which Megatron leaves its loop early (training.py:4155)
            if end.code or not stop.agreed:
                raise
            return False
        finally:
            watch.stop()
    return True


def _watch(run: Run, rank: int, world_size: int, *, to_launcher: bool) -> Watch:
    def end(error: WorkError, first: bool) -> None:
        if first or to_launcher:
            report_failure(error, to_launcher=to_launcher, verbose=False)
        _end(error.exit_code)

    def step() -> int:
        from megatron.training import get_args

        return int(get_args().curr_iteration) + 1

    timeout = run.timeout_minutes * 60
    return Watch(rank=rank, world_size=world_size, timeout=timeout, end=end, step=step, store=default_store)


def _activate(device: Device, verbose: bool) -> None:
    """Make Megatron importable and runnable on `device`; before this nothing of it may be imported."""
    from mellum2_megatron import upstream

    if not verbose:
        upstream.quiet_upstream()
    if device == "cpu":
        from mellum2_megatron import cpu

        cpu.activate()
    else:
        upstream.activate()


def _pretrain(run: Run, world_size: int, device: Device, stop: StopRequest, watch: Watch) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from mellum2_megatron import saving
    from mellum2_megatron.guard import StepGuard
    from mellum2_megatron.model.provider import run_model_provider
    from mellum2_megatron.training_metrics import TrainingMetrics

    backend = run.resolved_backend(device)
    words = megatron_arguments(run, world_size=world_size, device=device, backend=backend)
    sys.argv = [sys.argv[0], *words]  # Megatron has no other way in (megatron/training/arguments.py:parse_args)
    container = pretrain_cfg_container_from_args(parse_and_validate_args())
    metrics = TrainingMetrics(run)
    guard = StepGuard(run.stability, metrics.event)
    saving.install(run.checkpoint, watch.paused, also=guard.save)

    def loaded() -> None:
        metrics.start()
        guard.install(output_folder(run))
        stop.attach()

    try:
        pretrain(
            container,
            _dataset_provider(run, loaded),
            ModelType.encoder_or_decoder,
            watch.beating(guard.watching(forward_step)),
            # Not through the container: in 0.19.2 that path never lays parameters out for layer-wise Muon
            # (megatron/training/training.py:2040-2061), which then runs without sharding its state.
            model_provider=metrics.watching(run_model_provider(run, backend)),
        )
    finally:
        metrics.close()


def _dataset_provider(run: Run, loaded: Callable[[], None]) -> Any:
    """Return Megatron's dataset provider; the first of our functions to run after a checkpoint is `loaded`."""

    def provide(samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
        from mellum2_megatron.data.continued import ContinuedTraining
        from mellum2_megatron.data.datasets import build_datasets
        from mellum2_megatron.data.fixed_validation import FixedValidation

        loaded()
        per_validation = run.logging.eval_iterations * run.eval_batch_size
        cache = None if run.data.cache is None else Path(run.data.cache)
        counts = (samples[0] - run.data.first_sample, per_validation, 0)
        train_set, valid_set, _ = build_datasets(run, counts, vp_stage=vp_stage, cache=cache)
        if train_set is not None and run.data.first_sample:
            train_set = ContinuedTraining(train_set, first=run.data.first_sample)
        if valid_set is not None and per_validation:
            valid_set = FixedValidation(valid_set, period=per_validation, length=samples[1])
        return train_set, valid_set, None

    provide.is_distributed = True  # type: ignore[attr-defined]  # built on every rank, with barriers inside
    return provide


def forward_step(
    data_iterator: Iterator[Batch], model: torch.nn.Module, *_: Any
) -> tuple[torch.Tensor, functools.partial[Any]]:
    """Run one micro-batch through this stage of the model (Megatron's `forward_step_func`).

    Returns:
        Per-token loss `[b, s]` on the last pipeline stage (hidden states elsewhere), and the function that sums it.
    """
    from megatron.core.utils import get_attr_wrapped_model

    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, functools.partial(sum_loss, batch["loss_mask"])


def get_batch(data_iterator: Iterator[Batch], vp_stage: int | None = None) -> Batch:
    """Return this rank's share of the next micro-batch, with None for what its pipeline stage does not read.

    Tensor-parallel rank 0 reads, the others receive; context parallelism keeps two zigzag chunks of each sequence.

    Returns:
        `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each `[b, s / cp]`.
    """
    import torch
    from megatron.core import parallel_state as mpu
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args

    args = get_args()
    stage: dict[str, Any] = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    first, last = mpu.is_pipeline_first_stage(**stage), mpu.is_pipeline_last_stage(**stage)
    if not (first or last):
        return dict.fromkeys(_TEXT)
    batch: Batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        device = torch.cuda.current_device()
        for name in _TEXT:
            tensor = sample[name]
            assert tensor is not None
            batch[name] = tensor.to(device, non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp_on_this_rank(
            layout=None, mtp_num_layers=args.mtp_num_layers, ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {name: batch.get(name) for name in _TEXT}


def sum_loss(
    loss_mask: torch.Tensor | None, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the loss over the tokens that count (Megatron's loss function, its three-value form).

    Args:
        loss_mask: `[b, s]`, 1 where the token counts; None on a stage that has no loss, where this is never called.
        output: per-token loss `[b, s]`, nats.

    Raises:
        RuntimeError: the sum is not finite (`failures.explained` puts it in words).

    Returns:
        The sum, the number of tokens, and for the log `{"lm loss": [sum, number]}`; Megatron divides.
    """
    import torch
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    assert loss_mask is not None
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1))
    # As Megatron-LM's pretrain_gpt.py; gradients are checked by its DistributedDataParallel.
    get_rerun_state_machine().validate_result(
        result=loss.detach(), rejection_func=lambda value: not value.isfinite(), message="loss of a micro-batch"
    )
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


if __name__ == "__main__":
    sys.exit(main())
