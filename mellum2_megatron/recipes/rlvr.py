"""Reinforcement learning from rewards that can be checked, after each fine-tuning (report §5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import (
    Data,
    Layout,
    Logging,
    Loss,
    Objective,
    Optimizer,
    Precision,
    Rl,
    Schedule,
    Stability,
)
from mellum2_megatron.recipes.hardware import BF16, Hardware, with_even_shares
from mellum2_megatron.recipes.long_context import LONG_CONTEXT
from mellum2_megatron.recipes.stage import Stage

PROMPT_TOKENS = 4096
"""Longest prompt beside an answer of full length. The report does not say."""

WARMUP_STEPS = 50

LOSS = Loss(
    aux_loss_type="none", aux_loss_coef=0.0, z_loss_coef=0.0, per_token=True, head_chunk=None
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of reinforcement learning.

    Attributes:
        name: end of the stage's name, and of the fine-tuning before it.
        tokens: tokens of the longest answer (report §5.2).
        steps: steps of the training (report §5.2).
        cp: ranks that share a sequence of the 12B; ours.
    """

    name: str
    tokens: int
    steps: int
    cp: int


INSTRUCT = Kind(name="instruct", tokens=16_384, steps=500, cp=2)
THINKING = Kind(name="thinking", tokens=40_960, steps=100, cp=4)

SOURCES = {
    **LONG_CONTEXT.sources,
    "layout": "ours: the experts of a layer inside one node, as in the report's other stages",
    "optimizer": "report §5.2: AdamW, from 1e-6 to 1e-7, betas 0.9 and 0.999",
    "optimizer.clip_grad": "report §3; §5.2 names no other",
    "optimizer.adam_eps": "report §3; §5.2 names no other",
    "optimizer.min_lr": "report §5.2",
    "optimizer.lr": "report §5.2",
    "loss": "ours: the router is frozen, so nothing balances it; NeMo-RL has no such losses either",
    "loss.mtp_factor": "report §2; §5.2 does not say",
    "loss.per_token": "report §5.2: normalised over tokens",
    "loss.head_chunk": "ours: each token has a gradient of its own, which chunks cannot have",
    "precision": "ours: BF16 on both sides, because each format has roundings of its own",
    "schedule": "report §5.2: from 1e-6 to 1e-7; ours: cosine, as in SFT",
    "schedule.train_samples": "report §5.2: number of steps",
    "schedule.warmup_samples": "report §5.2: 50 steps",
    "schedule.batch_schedule": "report §5.2: 256 prompts with 16 answers",
    "schedule.micro_batch_size": "ours: one answer",
    "data.path": "ours: tasks whose answers a program can check (docs/rlvr.md)",
    "data.document_attention": "ours: an answer is a sequence of its own",
    "data.phase": "ours: no corpus plan",
    "data.sequence_length": f"report §5.2: the answer; ours: {PROMPT_TOKENS:,} tokens of prompt",
    "stability": "ours: the loss of a policy is around 0, so no multiple of it is a spike",
    "rl": "ours: the report does not say",
    "rl.objective": "report §5.2",
    "rl.objective.overlong_tokens": "ours: the report names a soft penalty without numbers",
    "rl.objective.overlong_penalty": "ours: the report names a soft penalty without numbers",
    "rl.objective.concision_penalty": "ours: the report names one without numbers",
    "rl.objective.concision_free_tokens": "ours: the report names one without numbers",
    "rl.ahead": "report §5.2: asynchronous, answers at most 2 updates old",
    "rl.engine": "report §5.2: vLLM",
    "rl.freeze_router": "ours: as NeMo-RL's default; the report does not say",
    "rl.mtp_detach": "ours: the policy's gradient is the objective's alone",
    "checkpoint.load": "ours: from the fine-tuned model of this kind, weights only",
}


def rlvr_stage(
    kind: Kind,
    *,
    architecture: Mellum2Architecture,
    optimizer: Optimizer,
    schedule: Schedule,
    data: Data,
    rl: Rl,
    logging: Logging,
    save_interval: int,
    hardware: Mapping[str, Hardware],
    sources: Mapping[str, str],
    keep_last: int | None = None,
    retain_interval: int | None = None,
) -> Stage:
    """Return one kind of reinforcement learning as a stage.

    Args:
        kind: the kind.
        architecture: the fine-tuned model.
        optimizer, schedule, data, rl, logging, save_interval, hardware, keep_last,
            retain_interval: see `Stage`.
        sources: overrides of `SOURCES`.
    """
    objective = rl.objective
    return Stage(
        name=f"rlvr_{kind.name}",
        summary=f"RLVR, {kind.name} ({schedule.train_steps} steps of {objective.prompts} x "
        f"{objective.group_size} answers, {objective.max_tokens:,} tokens)",
        architecture=architecture,
        optimizer=optimizer,
        loss=LOSS,
        schedule=schedule,
        precision=Precision(),
        data=data,
        rl=rl,
        stability=Stability(spike="ignore"),
        logging=logging,
        save_interval=save_interval,
        keep_last=keep_last,
        retain_interval=retain_interval,
        start="weights",
        after=f"sft_{kind.name}",
        hardware=hardware,
        sources={**SOURCES, **sources},
    )


def rl_schedule(objective: Objective, *, steps: int, warmup_steps: int) -> Schedule:
    """Return the schedule whose step is a batch of the objective."""
    return Schedule.from_steps(
        style="cosine",
        train_steps=steps,
        warmup_steps=warmup_steps,
        batch_sizes=((0, objective.prompts * objective.group_size),),
        micro_batch_size=1,
    )


def _of_12b(kind: Kind) -> Stage:
    objective = Objective(max_tokens=kind.tokens)
    return rlvr_stage(
        kind,
        architecture=LONG_CONTEXT.architecture,
        optimizer=Optimizer(
            name="adam", lr=1e-6, min_lr=1e-7, weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.999
        ),
        schedule=rl_schedule(objective, steps=kind.steps, warmup_steps=WARMUP_STEPS),
        data=Data(
            path=f"data/rlvr_{kind.name}",
            tokenizer=f"runs/mellum2_12b_sft_{kind.name}/tokenizer",
            sequence_length=kind.tokens + PROMPT_TOKENS,
            workers=0,
            feed="rollouts",
        ),
        rl=Rl(
            objective=objective,
            engine="vllm",
            url="http://127.0.0.1:8000",
            ahead=2,
            eval_answers=1,
        ),
        logging=Logging(log_interval=1, eval_interval=25, eval_iterations=0),
        save_interval=25,
        hardware={
            "": _h200(128, kind.cp, "ours: as many as SFT's; the report does not say"),
            "_8gpu_h200_bf16": _h200(8, kind.cp, "ours: the same training on one node"),
        },
        keep_last=3,
        retain_interval=50,
        sources={},
    )


def _h200(gpus: int, cp: int, source: str) -> Hardware:
    machines = Hardware(
        label=f"{gpus} H200",
        layout=Layout(ep=8, cp=cp, dp=gpus // cp),
        source=source,
        sources={"precision.compute": BF16},
    )
    return with_even_shares(machines)


RLVR = tuple(map(_of_12b, (INSTRUCT, THINKING)))
"""Both kinds of the 12B."""
