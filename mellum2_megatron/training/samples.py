"""Texts that the model generates while it trains, from the same prompts each time.

All ranks take part, because tensor, pipeline, expert and context parallelism need all of them.
Every data-parallel replica decodes the same prompts. Decoding is greedy, and runs the whole
sequence again for each token: simple, and in every layout the forward pass of a validation.

Nothing of the training changes: no gradient, evaluation mode, random states put back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_timers, training

from mellum2_megatron.data.feed.entries import tokenizer_folder
from mellum2_megatron.data.tokens.prompts import encode_prompts
from mellum2_megatron.data.tokens.tokenizer import special_ids
from mellum2_megatron.model.context_parallel import partition_indices

if TYPE_CHECKING:
    from mellum2_megatron.config import Run

_ALIGNMENT = 16
"""Lengths are a multiple of it on each rank, as FP8 kernels need
(transformer_engine/pytorch/utils.py, assert_dim_for_fp8_exec, 2.20.2)."""


class TrainingSamples:
    """Generates texts from the prompts of a run.

    Args:
        run: a resolved run.
        on_texts: called on every rank with the step and the ``(prompt, continuation)`` pairs.
        pause_watch: context manager in which the hang watch is off: no micro-batch of the training
            starts meanwhile.
    """

    def __init__(
        self,
        run: Run,
        *,
        on_texts: Callable[[int, list[tuple[str, str]]], None],
        pause_watch: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._run, self._on_texts, self._pause_watch = run, on_texts, pause_watch

    def wrap_end_of_step(self, callbacks: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `post_training_step_callbacks`, called after each step on every rank."""

        @functools.wraps(callbacks)
        def end_step(
            model: list[torch.nn.Module],
            optimizer: Any,
            scheduler: Any,
            iteration: int,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            result = callbacks(model, optimizer, scheduler, iteration, *args, **kwargs)
            logging = self._run.logging
            is_last = iteration == self._run.schedule.train_steps
            if logging.sample_prompts and (iteration % logging.sample_interval == 0 or is_last):
                with self._pause_watch(), outside_of_training(model, optimizer):
                    texts = self._generate(model)
                self._on_texts(iteration, texts)
            return result

        return end_step

    def _generate(self, model: list[torch.nn.Module]) -> list[tuple[str, str]]:
        """Continue every prompt; the same result on every rank."""
        from tokenizers import Tokenizer

        run, folder = self._run, tokenizer_folder(self._run.data)
        new = run.logging.sample_tokens
        prompts = encode_prompts(
            folder, run.logging.sample_prompts, longest=run.data.sequence_length - new
        )
        eos, tokenizer = (
            special_ids(folder)["eos"],
            Tokenizer.from_file(str(folder / "tokenizer.json")),
        )
        continued = greedy(model, prompts, new=new, pad=eos, vocab_size=run.architecture.vocab_size)
        texts = []
        for prompt, ids in zip(run.logging.sample_prompts, continued, strict=True):
            # Ids above the tokenizer's own belong to no text: a model may have spare ones.
            kept = ids[: ids.index(eos)] if eos in ids else ids
            texts.append((prompt, tokenizer.decode(kept, skip_special_tokens=False)))
        return texts


@torch.no_grad()
def greedy(
    model: list[torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    *,
    new: int,
    pad: int,
    vocab_size: int,
) -> list[list[int]]:
    """Return the most probable next tokens after each prompt, ``new`` of them.

    Args:
        model: model parts of this rank, in evaluation mode.
        prompts: token ids of each prompt.
        new: number of tokens to generate.
        pad: token that fills the rest of a sequence; causal attention never sees it.
        vocab_size: number of ids that may be generated; the output layer may have spare rows.
    """
    cp, tp = mpu.get_context_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()
    block = 2 * cp * tp * _ALIGNMENT
    length = -(-(max(map(len, prompts)) + new) // block) * block
    # Interleaved stages need a multiple of the pipeline's size
    # (core/pipeline_parallel/schedules.py:1002, 0.19.2); else all prompts are one micro-batch.
    parts = mpu.get_pipeline_model_parallel_world_size() if len(model) > 1 else 1
    rows = -(-len(prompts) // parts)
    padded = [*prompts, *[prompts[-1]] * (rows * parts - len(prompts))]
    device = torch.cuda.current_device()
    tokens_bs = torch.full((len(padded), length), pad, dtype=torch.long)
    for row, prompt in enumerate(padded):
        tokens_bs[row, : len(prompt)] = torch.tensor(prompt)
    tokens_bs = tokens_bs.to(device)
    held = partition_indices((0, length), cp, mpu.get_context_parallel_rank()).to(device)
    ends = torch.tensor([len(prompt) for prompt in padded], device=device)
    for _ in range(new):
        batches = [
            (tokens_bs[first : first + rows], ends[first : first + rows] - 1)
            for first in range(0, len(padded), rows)
        ]
        next_b = _next_tokens(model, batches, held, vocab_size)
        tokens_bs[torch.arange(len(padded), device=device), ends] = next_b
        ends = ends + 1
    return [
        tokens_bs[row, len(prompt) : len(prompt) + new].tolist()
        for row, prompt in enumerate(prompts)
    ]


def _next_tokens(
    model: list[torch.nn.Module],
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    held: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """Return the most probable token after each sequence, `[b]`, on every rank.

    Args:
        model: model parts of this rank.
        batches: micro-batches: tokens `[b, s]`, and position of the last token of each, `[b]`.
        held: positions of the tokens that this context-parallel rank holds, `[s / cp]`.
        vocab_size: number of ids that may be generated.
    """

    def forward(batch: Iterator[Any], part: torch.nn.Module, *_: Any) -> Any:
        tokens_bs, last_b = next(batch)
        local_bs = tokens_bs[:, held]
        output = part(local_bs, held.expand_as(local_bs), None)
        return output, functools.partial(pick, last_b)

    def pick(last_b: torch.Tensor, logits_bsv: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        here_bs = held[None] == last_b[:, None]
        index_b = here_bs.int().argmax(dim=1)
        rows_bv = logits_bsv[torch.arange(len(last_b), device=last_b.device), index_b].float()
        whole_bv = tensor_parallel.gather_from_tensor_model_parallel_region(rows_bv.contiguous())
        # One context-parallel rank holds the position; the others add 0 below.
        chosen_b: torch.Tensor = whole_bv[:, :vocab_size].argmax(dim=1) * here_bs.any(dim=1)
        return chosen_b

    iterators = [iter(batches) for _ in model]
    config = get_model_config(model[0])
    timers, config.timers = config.timers, None  # as in Megatron's own `evaluate`
    try:
        picked = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model,
            num_microbatches=len(batches),
            seq_length=batches[0][0].shape[1],
            micro_batch_size=batches[0][0].shape[0],
            decoder_seq_length=batches[0][0].shape[1],
            forward_only=True,
            collect_non_loss_data=True,
        )
    finally:
        config.timers = timers
    if mpu.is_pipeline_last_stage(ignore_virtual=True):
        next_b = torch.cat(picked)
        torch.distributed.all_reduce(next_b, group=mpu.get_context_parallel_group())
    else:
        next_b = torch.empty(sum(len(last) for _, last in batches), dtype=torch.long)
        next_b = next_b.to(held.device)
    torch.distributed.broadcast(
        next_b,
        src=mpu.get_pipeline_model_parallel_last_rank(),
        group=mpu.get_pipeline_model_parallel_group(),
    )
    return next_b


@contextmanager
def outside_of_training(model: list[torch.nn.Module], optimizer: Any) -> Iterator[None]:
    """Put the model into evaluation mode, and everything back at the end.

    The clock of a step stands still, and weights that the optimizer gathers late are complete, as
    around Megatron's own validation (training/training.py:4009-4059, 0.19.2).
    """
    args, tracker = get_args(), tensor_parallel.get_cuda_rng_tracker()
    states = torch.get_rng_state(), torch.cuda.get_rng_state(), tracker.get_states()
    get_timers()("interval-time").stop()
    hooked = training.should_disable_forward_pre_hook(args)
    if hooked:
        training.disable_forward_pre_hook(model, optimizer=optimizer)
    for part in model:
        part.eval()
    try:
        yield
    finally:
        for part in model:
            part.train()
        if hooked:
            training.enable_forward_pre_hook(model)
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state(states[1])
        tracker.set_states(states[2])
        get_timers()("interval-time", log_level=0).start(barrier=True)
