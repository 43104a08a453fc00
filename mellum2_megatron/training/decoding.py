"""Forward passes of the model in training: next tokens, and scores of given ones, in every layout.

All ranks take part, because tensor, pipeline, expert and context parallelism need all of them.
Every data-parallel replica decodes the same prompts. Decoding is greedy, and runs the whole
sequence again for each token: simple, and in every layout the forward pass of a validation.

Nothing of the training changes: no gradient, evaluation mode, random states put back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_timers, training

from mellum2_megatron.model.context_parallel import partition_indices

_ALIGNMENT = 16
"""Lengths are a multiple of it on each rank, as FP8 kernels need
(transformer_engine/pytorch/utils.py, assert_dim_for_fp8_exec, 2.20.2)."""

_ROWS = 8
"""Most sequences of a micro-batch: the logits of all their positions are in memory at once."""

Batch = tuple[torch.Tensor, torch.Tensor]
"""Tokens of a micro-batch `[b, s]`, and what is asked about them: for each row, or each token."""


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
    rows = _Rows.of(model, [len(prompt) + new for prompt in prompts])
    tokens_bs = rows.fill(prompts, pad)
    device = tokens_bs.device
    ends = torch.tensor([len(prompts[row]) for row in rows.order], device=device)

    def pick(batch: Batch, logits_bsv: torch.Tensor) -> torch.Tensor:
        last_b = batch[1]
        here_bs = rows.held[None] == last_b[:, None]
        index_b = here_bs.int().argmax(dim=1)
        rows_bv = logits_bsv[torch.arange(len(last_b), device=device), index_b].float()
        whole_bv = tensor_parallel.gather_from_tensor_model_parallel_region(rows_bv.contiguous())
        # One context-parallel rank holds the position; the others add 0 in `_collect`.
        chosen_b: torch.Tensor = whole_bv[:, :vocab_size].argmax(dim=1) * here_bs.any(dim=1)
        return chosen_b

    for _ in range(new):
        next_b = _collect(model, rows, tokens_bs, ends - 1, pick, torch.empty_like(ends))
        tokens_bs[torch.arange(len(ends), device=device), ends] = next_b
        ends = ends + 1
    return [
        tokens_bs[row, len(prompt) : len(prompt) + new].tolist()
        for row, prompt in enumerate(prompts)
    ]


@torch.no_grad()
def token_scores(
    model: list[torch.nn.Module], texts: Sequence[Sequence[int]], *, pad: int, vocab_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return how the model takes the tokens of texts, given those before them.

    Args:
        model: model parts of this rank, in evaluation mode.
        texts: token ids of each text, two or more.
        pad: token that fills the rest of a sequence; causal attention never sees it.
        vocab_size: number of ids that the model may choose; the output layer may have spare rows.

    Returns:
        For each text its log-probabilities in nats, `[s - 1]`, float32, and whether the token was
        the most probable one, `[s - 1]`; place t belongs to token t + 1. On the CPU.
    """
    rows = _Rows.of(model, [len(text) for text in texts])
    tokens_bs = rows.fill(texts, pad)
    # The token at the last place has no successor; what is scored there is not returned.
    wanted_bs = tokens_bs.roll(-1, dims=1)

    def pick(batch: Batch, logits_bsv: torch.Tensor) -> torch.Tensor:
        wanted_bs = batch[1][:, rows.held]
        log_bs, most_bs = _scores(logits_bsv, wanted_bs, vocab_size)
        found = torch.zeros(*batch[1].shape, 2, device=logits_bsv.device)
        found[:, rows.held] = torch.stack([log_bs, most_bs.float()], dim=-1)
        return found

    empty = torch.empty(*tokens_bs.shape, 2, device=tokens_bs.device)
    found = _collect(model, rows, tokens_bs, wanted_bs, pick, empty).cpu()
    return [
        (found[row, : len(text) - 1, 0], found[row, : len(text) - 1, 1] > 0.5)
        for row, text in enumerate(texts)
    ]


def _scores(
    logits_bsv: torch.Tensor, wanted_bs: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability and "is the most probable" of wanted tokens, `[b, s]` each.

    Args:
        logits_bsv: logits of this tensor-parallel rank's part of the vocabulary, `[b, s, v / tp]`.
        wanted_bs: token ids.
        vocab_size: ids from it on are left out.
    """
    group = mpu.get_tensor_model_parallel_group()
    part = logits_bsv.shape[-1]
    first = mpu.get_tensor_model_parallel_rank() * part
    # Row by row: the whole micro-batch in float32 would double the largest tensor there is.
    found = []
    for logits_sv, wanted_s in zip(logits_bsv, wanted_bs, strict=True):
        logits_sv = logits_sv.float()
        ids = torch.arange(first, first + part, device=logits_sv.device)
        logits_sv = logits_sv.masked_fill(ids >= vocab_size, -torch.inf)
        highest_s = logits_sv.amax(dim=-1)
        torch.distributed.all_reduce(highest_s, torch.distributed.ReduceOp.MAX, group=group)
        sum_s = (logits_sv - highest_s[:, None]).exp().sum(dim=-1)
        torch.distributed.all_reduce(sum_s, group=group)
        here_s = (wanted_s >= first) & (wanted_s < first + part)
        place_s1 = (wanted_s - first).clamp(0, part - 1)[:, None]
        own_s = logits_sv.gather(1, place_s1)[:, 0].masked_fill(~here_s, 0)
        torch.distributed.all_reduce(own_s, group=group)
        found.append((own_s - highest_s - sum_s.log(), own_s == highest_s))
    return torch.stack([log for log, _ in found]), torch.stack([most for _, most in found])


class _Rows:
    """Sequences of one length, divided into micro-batches of one size.

    Attributes:
        length: tokens of each sequence.
        size: sequences of a micro-batch.
        order: number of the text that each row holds; the last text fills up the last micro-batch.
        held: positions of the tokens that this context-parallel rank holds, `[s / cp]`.
    """

    def __init__(self, length: int, size: int, order: list[int], held: torch.Tensor) -> None:
        self.length, self.size, self.order, self.held = length, size, order, held

    @classmethod
    def of(cls, model: list[torch.nn.Module], lengths: Sequence[int]) -> _Rows:
        """Return the rows for texts of given lengths."""
        cp, tp = mpu.get_context_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()
        block = 2 * cp * tp * _ALIGNMENT
        length = -(-max(lengths) // block) * block
        parts = -(-len(lengths) // _ROWS)
        if len(model) > 1:
            # Interleaved stages need a multiple of the pipeline's size
            # (core/pipeline_parallel/schedules.py:1002, 0.19.2).
            stages = mpu.get_pipeline_model_parallel_world_size()
            parts = -(-parts // stages) * stages
        size = -(-len(lengths) // parts)
        order = [min(row, len(lengths) - 1) for row in range(parts * size)]
        held = partition_indices((0, length), cp, mpu.get_context_parallel_rank())
        return cls(length, size, order, held.to(torch.cuda.current_device()))

    def fill(self, texts: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
        """Return token ids `[rows, length]` on the device."""
        tokens = torch.full((len(self.order), self.length), pad, dtype=torch.long)
        for row, text in enumerate(self.order):
            tokens[row, : len(texts[text])] = torch.tensor(texts[text])
        return tokens.to(self.held.device)


def _collect(
    model: list[torch.nn.Module],
    rows: _Rows,
    tokens_bs: torch.Tensor,
    asked: torch.Tensor,
    pick: Callable[[Batch, torch.Tensor], torch.Tensor],
    empty: torch.Tensor,
) -> torch.Tensor:
    """Run the model forward; return what ``pick`` takes from its logits, the same on every rank.

    Args:
        model: model parts of this rank.
        rows: division of the rows.
        tokens_bs: token ids of all rows.
        asked: what is asked about them, a row each.
        pick: given a micro-batch and logits `[b, s / cp, v / tp]`, returns a row for each sequence;
            0 for what another context-parallel rank holds.
        empty: tensor of the result's shape, for the ranks that have no logits.
    """
    batches = list(
        zip(torch.split(tokens_bs, rows.size), torch.split(asked, rows.size), strict=True)
    )

    def forward(batch: Iterator[Any], part: torch.nn.Module, *_: Any) -> Any:
        given = next(batch)
        local_bs = given[0][:, rows.held]
        output = part(local_bs, rows.held.expand_as(local_bs), None)
        return output, functools.partial(taken, given)

    def taken(given: Batch, logits_bsv: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        return pick(given, logits_bsv)

    iterators = [iter(batches) for _ in model]
    config = get_model_config(model[0])
    timers, config.timers = config.timers, None  # as in Megatron's own `evaluate`
    try:
        picked = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model,
            num_microbatches=len(batches),
            seq_length=rows.length,
            micro_batch_size=rows.size,
            decoder_seq_length=rows.length,
            forward_only=True,
            collect_non_loss_data=True,
        )
    finally:
        config.timers = timers
    if mpu.is_pipeline_last_stage(ignore_virtual=True):
        result = torch.cat(picked)
        torch.distributed.all_reduce(result, group=mpu.get_context_parallel_group())
    else:
        result = empty
    torch.distributed.broadcast(
        result,
        src=mpu.get_pipeline_model_parallel_last_rank(),
        group=mpu.get_pipeline_model_parallel_group(),
    )
    return result


def after_steps[R](
    callbacks: Callable[..., Any],
    *,
    is_due: Callable[[int], bool],
    work: Callable[[list[torch.nn.Module]], R],
    report: Callable[[int, R], None],
    pause_watch: Callable[[], AbstractContextManager[None]],
) -> Callable[..., Any]:
    """Wrap Megatron's `post_training_step_callbacks`: some steps are followed by work of our own.

    Args:
        callbacks: upstream's function, called after each step on every rank.
        is_due: whether work follows a step.
        work: given the model's parts, in evaluation mode.
        report: called with the step and what ``work`` returned.
        pause_watch: context manager in which the hang watch is off: no micro-batch of the training
            starts meanwhile.
    """

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
        if is_due(iteration):
            with pause_watch(), outside_of_training(model, optimizer):
                done = work(model)
            report(iteration, done)
        return result

    return end_step


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
