"""The report's pre-training of Mellum 2 12B as runs: three phases of one schedule, long context; a slice for one GPU.

A phase is a run of its own, with its own data and folder, and the same training: it goes on from the former's last
checkpoint with weights, optimizer state, step and sample count (`checkpoint.continue_from`), so that step 1 is the
first of phase 1 and step 323,459 the last of phase 3, under one learning-rate schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.layout import Layout
from mellum2_megatron.optimizer import Loss, Optimizer
from mellum2_megatron.precision import Precision
from mellum2_megatron.run import Checkpoint, Data, Logging, Run
from mellum2_megatron.schedule import Schedule

OPERATION = "ours: how the run is operated"

SEQUENCE_LENGTH = 8192
"""Tokens a sequence up to the long-context stage (report §2)."""

LONG_SEQUENCE_LENGTH = 131_072
"""Tokens a sequence from the long-context stage on (report §4)."""

TRAIN_STEPS = 323_459
"""Optimizer steps of the three phases (report App. B)."""

RAMP_STEPS = 12_128
"""Steps at 2,048 sequences before the batch doubles.

The report gives neither the length nor the shape of the ramp. With one step from 2,048 to 4,096 its two totals leave no
choice: 323,459 steps see 10.65T tokens (report §3) only if about 12,128 of them were half as large.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of pre-training.

    Attributes:
        name: the report's.
        tokens: seen in it (report §3); the three round to 10.66T, 0.01T more than the whole, which ends the last one.
        schedule: what the learning rate does.
    """

    name: str
    tokens: float
    schedule: str


PHASES = (
    Phase(name="Foundation", tokens=6.18e12, schedule="warmup, batch ramp and hold"),
    Phase(name="Quality Uplift", tokens=2.79e12, schedule="hold"),
    Phase(name="Capability Sharpening", tokens=1.69e12, schedule="hold, then decay to zero"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What a recipe runs on.

    Attributes:
        gpus: how many H200.
        source: where that number comes from.
    """

    gpus: int
    source: str

    @property
    def suffix(self) -> str:
        """End of the recipe's name."""
        return f"{self.gpus}gpu_h200_fp8"


H200_256 = Hardware(gpus=256, source="report §3: 32 nodes of 8 H200")
H200_128 = Hardware(gpus=128, source="report §3: 16 nodes of 8 H200, as later in the training")
H200_8 = Hardware(gpus=8, source="ours: the same training on one node")


def whole_schedule() -> Schedule:
    """Return the one schedule of the three phases (report §3, App. B)."""
    return Schedule.from_steps(
        train_steps=TRAIN_STEPS,
        warmup_steps=2_000,
        decay_steps=49_306,
        batch_sizes=((0, 2048), (RAMP_STEPS, 4096)),
        micro_batch_size=2,
    )


def phase_ends() -> tuple[int, ...]:
    """Return the sample after the last one of each phase, on whole steps."""
    whole = whole_schedule()
    ends, tokens = [], 0.0
    for phase in PHASES[:-1]:
        tokens += phase.tokens
        ends.append(whole.samples(whole.steps(round(tokens / SEQUENCE_LENGTH))))
    return (*ends, whole.train_samples)


def pretraining_recipes() -> dict[str, Callable[[], Run]]:
    """Return every recipe of this module by name; a name without hardware is short for the report's own."""
    found: dict[str, Callable[[], Run]] = {}
    for number in range(1, len(PHASES) + 1):
        base = f"mellum2_12b_pretrain_phase{number}"
        for ending, hardware in _named(H200_256, H200_128, H200_8).items():
            found[base + ending] = functools.partial(_phase, number, ending, hardware)
    for ending, hardware in _named(H200_128).items():
        found[f"mellum2_12b_long_context{ending}"] = functools.partial(_long_context, ending, hardware)
    found["mellum2_4layer_pretrain_1gpu_h200_fp8"] = _four_layers
    return found


def _named(*variants: Hardware) -> dict[str, Hardware]:
    return {"": variants[0]} | {f"_{hardware.suffix}": hardware for hardware in variants}


def _phase(number: int, ending: str, hardware: Hardware) -> Run:
    """Return phase ``number`` (from 1) of pre-training."""
    whole, ends, phase = whole_schedule(), phase_ends(), PHASES[number - 1]
    first = ends[number - 2] if number > 1 else 0
    before = f"runs/mellum2_12b_pretrain_phase{number - 1}{ending}" if number > 1 else None
    return Run(
        name=f"mellum2_12b_pretrain_phase{number}{ending}",
        description=f"Mellum 2 12B, phase {number} of 3 ({phase.name}, {phase.tokens / 1e12:g}T tokens at 8K): "
        f"{phase.schedule}, on {hardware.gpus} GPUs.",
        architecture=Mellum2Architecture.preset("mellum2-12b"),
        layout=Layout(ep=8, dp=hardware.gpus),
        optimizer=Optimizer(),
        loss=Loss(),
        schedule=Schedule(
            train_samples=ends[number - 1],
            horizon_samples=whole.train_samples,
            warmup_samples=whole.warmup_samples,
            decay_samples=whole.decay_samples,
            batch_schedule=whole.batch_schedule,
            micro_batch_size=whole.micro_batch_size,
        ),
        precision=Precision(compute="fp8"),
        data=Data(path=f"data/phase{number}", sequence_length=SEQUENCE_LENGTH, first_sample=first),
        logging=Logging(log_interval=10, eval_interval=1000, eval_iterations=8),
        checkpoint=Checkpoint(save_interval=1000, continue_from=before),
        sources=_COMMON
        | {
            "architecture.max_position_embeddings": "report §2: 8,192 native; released Base-Pretrain config.json",
            "layout": "report §3: EP 8, TP 1, PP 1",
            "layout.dp": hardware.source,
            "schedule.style": "report §3: WHD",
            "schedule.train_samples": _end_source(number),
            "schedule.horizon_samples": "report App. B: 323,459 steps, of which RAMP_STEPS at 2,048 sequences",
            "schedule.warmup_samples": "report App. B: 2,000 steps, all of them at 2,048 sequences",
            "schedule.decay_samples": "report App. B: the last 49,306 steps, at 4,096 sequences",
            "schedule.batch_schedule": "report §3: 2,048 to 4,096; when follows from steps and tokens, see RAMP_STEPS",
            "schedule.micro_batch_size": "report App. B",
            "data.sequence_length": "report §3: packed into 8,192 tokens",
            "data.first_sample": "where the former phase ended; each phase has data of its own (report §3)",
            "checkpoint.continue_from": "the report's one schedule of 323,459 steps: state and step count go on",
        },
    )


def _end_source(number: int) -> str:
    if number == len(PHASES):
        return "report App. B: the last of 323,459 steps"
    told = " + ".join(f"{phase.tokens / 1e12:g}T" for phase in PHASES[:number])
    return f"report §3: {told} tokens, rounded up to a whole step"


def _long_context(ending: str, hardware: Hardware) -> Run:
    """Return the extension to 131,072 tokens."""
    sequences = 256
    return Run(
        name=f"mellum2_12b_long_context{ending}",
        description=f"Mellum 2 12B, long context (117B tokens at 128K, layer-selective YaRN), on {hardware.gpus} GPUs.",
        architecture=Mellum2Architecture.preset("mellum2-12b-128k"),
        layout=Layout(ep=8, cp=8, dp=hardware.gpus // 8),
        optimizer=Optimizer(lr=3e-5),
        schedule=Schedule.from_steps(
            train_steps=3_500, warmup_steps=100, decay_steps=500, batch_sizes=((0, sequences),), micro_batch_size=1
        ),
        precision=Precision(compute="fp8"),
        data=Data(path="data/long_context", sequence_length=LONG_SEQUENCE_LENGTH),
        logging=Logging(log_interval=10, eval_interval=500, eval_iterations=4),
        checkpoint=Checkpoint(save_interval=500, load="runs/mellum2_12b_pretrain_phase3"),
        sources=_COMMON
        | {
            "architecture.max_position_embeddings": "report §4: 131,072",
            "architecture.rope_full_attention": "report §4: YaRN on the full-attention layers only; released config",
            "layout": "EP 8 and CP 8 as in the report's SFT at the same length (report §5.1); §4 gives none",
            "layout.dp": "report §5.1: 16 nodes of 8 H200",
            "optimizer.lr": "report §4",
            "schedule": "report §4: WHD of 3,500 steps with 500 of decay",
            "schedule.warmup_samples": "ours: 100 steps, as in the report's SFT (§5.1); §4 gives none",
            "schedule.batch_schedule": "report §4: 117B tokens in 3,500 steps of 131,072 tokens make 256 sequences",
            "schedule.micro_batch_size": "ours: one sequence is eight ranks' work",
            "data.sequence_length": "report §4",
            "checkpoint.load": "ours: weights only, since the stage has a schedule of its own",
        },
    )


def _four_layers() -> Run:
    """Return a pre-training of four layers at full width, one of them with full attention."""
    return Run(
        name="mellum2_4layer_pretrain_1gpu_h200_fp8",
        description="Four layers of the 12B at full width (2.55B parameters) on one GPU: the production path, small.",
        architecture=Mellum2Architecture.preset("mellum2-12b").replace(num_hidden_layers=4),
        layout=Layout(dp=1),
        optimizer=Optimizer(),
        schedule=Schedule.from_steps(
            train_steps=2_000, warmup_steps=100, decay_steps=300, batch_sizes=((0, 32), (200, 64)), micro_batch_size=2
        ),
        precision=Precision(compute="fp8"),
        data=Data(path="data/phase1", sequence_length=SEQUENCE_LENGTH),
        logging=Logging(log_interval=10, eval_interval=200, eval_iterations=8),
        checkpoint=Checkpoint(save_interval=500),
        sources=_COMMON
        | {
            "architecture": "report §2, table Architecture configuration, but for the depth",
            "architecture.num_hidden_layers": "ours: one period of the attention pattern",
            "layout": "ours: one GPU",
            "schedule": "report §3: WHD and a batch that doubles; its lengths are ours: one billion tokens",
            "schedule.micro_batch_size": "report App. B",
            "data.sequence_length": "report §3: packed into 8,192 tokens",
        },
    )


_COMMON: dict[str, Any] = {
    "architecture": "report §2, table Architecture configuration; released config.json",
    "layout.dispatcher": "ours: dropless all-to-all; the report names none",
    "optimizer": "report §3, App. B",
    "optimizer.muon_split_qkv": "Megatron's default; the report does not say",
    "optimizer.muon_split_gate_up": "Megatron's way; the report does not say",
    "optimizer.muon_router": "Megatron's way; the report does not say",
    "optimizer.muon_mtp_projection": "Megatron's way; the report does not say",
    "optimizer.muon_extra_scale": "report §3, after Moonlight (arXiv 2502.16982, §2.2)",
    "loss": "report §3",
    "loss.mtp_factor": "report §2",
    "precision": "report §3: BF16 + FP8 hybrid, tensorwise, gradients reduced in FP32",
    "precision.fp8_param_gather": "not the report's: wrong beside Muon in megatron-core 0.19.2, see rules.py",
    "precision.bf16_first_layers": "the report names no layer that stays in BF16",
    "precision.bf16_last_layers": "the report names no layer that stays in BF16",
    "data": OPERATION,
    "logging": OPERATION,
    "checkpoint": OPERATION,
    "seed": OPERATION,
    "backend": OPERATION,
    "timeout_minutes": OPERATION,
}
"""Sources that all of these runs share."""
