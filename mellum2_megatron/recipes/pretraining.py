"""The report's training of Mellum 2 as runs: three phases of one schedule, then long context, at
several sizes.

A phase is a run of its own, with its own data and folder, and the same training: it goes on from
the former's last checkpoint with weights, optimizer state, step and sample count
(`checkpoint.continue_from`), so that step 1 is the first of phase 1 and step 323,459 the last of
phase 3, under one learning-rate schedule. The long-context stage has a schedule of its own and
takes the weights of phase 3.

`Training` is what differs between the 12B, a slice of it that fits one GPU, and a tiny one
(tiny.py); the stages of all of them are built by the same functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.config import (
    Checkpoint,
    Data,
    Layout,
    Logging,
    Loss,
    Optimizer,
    Precision,
    Run,
    Schedule,
)
from mellum2_megatron.recipes.hardware import H200_1, H200_8, H200_128, H200_256, Hardware

OPERATION = "ours: how the run is operated"
STABILITY = (
    "ours: report §3.6 tells of spikes and their cause, not of a rule for steps that have one"
)

SEQUENCE_LENGTH = 8192
"""Tokens a sequence up to the long-context stage (report §2)."""

LONG_SEQUENCE_LENGTH = 131_072
"""Tokens a sequence from the long-context stage on (report §4)."""

TRAIN_STEPS = 323_459
"""Optimizer steps of the three phases (report App. B)."""

RAMP_STEPS = 12_128
"""Steps at 2,048 sequences before the batch doubles.

The report gives neither the length nor the shape of the ramp. With one step from 2,048 to 4,096 its
two totals leave no choice: 323,459 steps see 10.65T tokens (report §3) only if about 12,128 of them
were half as large.
"""

LONG_SEQUENCES = 256
"""Sequences a step of the long-context stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of pre-training.

    Attributes:
        name: the report's.
        tokens: seen in it (report §3); the three round to 10.66T, 0.01T more than the whole, which
            ends the last one.
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
class Training:
    """The four stages at one size.

    Attributes:
        name: beginning of the recipes' names.
        title: the same in their descriptions.
        architecture, long_architecture: the model of the phases, and with the long-context stage's
            rotation.
        schedule, ends: of the three phases, and the sample after the last one of each.
        tokens: a phase's, for its description.
        long_schedule, long_lr: of the long-context stage.
        optimizer, precision: of all stages.
        data, long_data: of each phase, and of the long-context stage.
        logging, long_logging, save_interval, long_save_interval: how the stages are operated.
        sources: of all stages, on top of the report's.
        phase_sources, long_sources: of the phases and of the long-context stage, on top of those.
    """

    name: str
    title: str
    architecture: Mellum2Architecture
    long_architecture: Mellum2Architecture
    schedule: Schedule
    ends: tuple[int, ...]
    tokens: tuple[str, ...]
    long_schedule: Schedule
    long_lr: float
    optimizer: Optimizer
    precision: Precision
    data: tuple[Data, ...]
    long_data: Data
    logging: Logging
    long_logging: Logging
    save_interval: int
    long_save_interval: int
    sources: dict[str, str] = field(default_factory=dict)
    phase_sources: dict[str, str] = field(default_factory=dict)
    long_sources: dict[str, str] = field(default_factory=dict)

    def phase_name(self, number: int, ending: str = "") -> str:
        """Return the name of the recipe of phase ``number`` (from 1)."""
        return f"{self.name}_pretrain_phase{number}{ending}"


def whole_schedule() -> Schedule:
    """Return the one schedule of the report's three phases (report §3, App. B)."""
    return Schedule.from_steps(
        train_steps=TRAIN_STEPS,
        warmup_steps=2_000,
        decay_steps=49_306,
        batch_sizes=((0, 2048), (RAMP_STEPS, 4096)),
        micro_batch_size=2,
    )


def phase_ends() -> tuple[int, ...]:
    """Return the sample after the last one of each of the report's phases, on whole steps."""
    whole = whole_schedule()
    ends, tokens = [], 0.0
    for phase in PHASES[:-1]:
        tokens += phase.tokens
        ends.append(whole.samples(whole.steps(round(tokens / SEQUENCE_LENGTH))))
    return (*ends, whole.train_samples)


def _training_12b() -> Training:
    ends = phase_ends()
    return Training(
        name="mellum2_12b",
        title="Mellum 2 12B",
        architecture=Mellum2Architecture.preset("mellum2-12b"),
        long_architecture=Mellum2Architecture.preset("mellum2-12b-128k"),
        schedule=whole_schedule(),
        ends=ends,
        tokens=tuple(f"{phase.tokens / 1e12:g}T tokens at 8K" for phase in PHASES),
        long_schedule=Schedule.from_steps(
            train_steps=3_500,
            warmup_steps=100,
            decay_steps=500,
            batch_sizes=((0, LONG_SEQUENCES),),
            micro_batch_size=1,
        ),
        long_lr=3e-5,
        optimizer=Optimizer(),
        precision=Precision(compute="fp8"),
        data=tuple(
            Data(path=f"data/phase{number}", sequence_length=SEQUENCE_LENGTH, first_sample=first)
            for number, first in enumerate((0, *ends[:-1]), 1)
        ),
        long_data=Data(path="data/long_context", sequence_length=LONG_SEQUENCE_LENGTH),
        logging=Logging(log_interval=10, eval_interval=1000, eval_iterations=8),
        long_logging=Logging(log_interval=10, eval_interval=500, eval_iterations=4),
        save_interval=1000,
        long_save_interval=500,
    )


SCHEDULE_KEYS = tuple(
    f"schedule.{name}"
    for name in (
        "train_samples",
        "horizon_samples",
        "warmup_samples",
        "decay_samples",
        "batch_schedule",
    )
)
"""What a training with a schedule of its own says other sources for."""

SLICE_SEQUENCE_LENGTH = 32_768
"""Tokens a sequence in the long-context stage of the slice: what one H200 holds."""


def _training_4layer() -> Training:
    """The slice: 1,000 steps of the phases, in the report's proportions."""
    whole = Schedule.from_steps(
        train_steps=1_000,
        warmup_steps=50,
        decay_steps=150,
        batch_sizes=((0, 32), (100, 64)),
        micro_batch_size=2,
    )
    steps = (588, 845, 1_000)
    ends = tuple(map(whole.samples, steps))
    full = _training_12b()
    sources = {
        "architecture": "report §2, table Architecture configuration, but for the depth",
        "architecture.num_hidden_layers": "ours: one period of the attention pattern",
        "layout": "ours: one GPU",
    }
    lengths = (
        "report §3: WHD and a batch that doubles; its lengths are ours, in the report's proportions"
    )
    return replace(
        full,
        name="mellum2_4layer",
        title="Four layers of the 12B",
        architecture=full.architecture.replace(num_hidden_layers=4),
        long_architecture=full.long_architecture.replace(num_hidden_layers=4),
        schedule=whole,
        ends=ends,
        tokens=tuple(
            f"{(end - first) * SEQUENCE_LENGTH / 1e6:.0f}M tokens at 8K"
            for first, end in zip((0, *ends), ends, strict=False)
        ),
        long_schedule=Schedule.from_steps(
            train_steps=100,
            warmup_steps=5,
            decay_steps=15,
            batch_sizes=((0, 16),),
            micro_batch_size=1,
        ),
        data=tuple(
            replace(data, first_sample=first)
            for data, first in zip(full.data, (0, *ends), strict=False)
        ),
        long_data=replace(full.long_data, sequence_length=SLICE_SEQUENCE_LENGTH),
        logging=Logging(log_interval=10, eval_interval=200, eval_iterations=8),
        long_logging=Logging(log_interval=5, eval_interval=50, eval_iterations=4),
        save_interval=200,
        long_save_interval=50,
        sources=sources,
        phase_sources=dict.fromkeys(SCHEDULE_KEYS, lengths),
        long_sources={
            "schedule": "report §4: WHD; its lengths are ours, in the report's proportions",
            "schedule.warmup_samples": "ours, in the report's proportions",
            "schedule.batch_schedule": "ours: 0.5M tokens a step",
            "data.sequence_length": "ours: what one GPU holds; the rotation is the 128K one (report §4)",
        },
    )


def pretraining_recipes() -> dict[str, Callable[[], Run]]:
    """Return every recipe of this module by name; a name without hardware is short for the report's
    own."""
    big, slice_ = _training_12b(), _training_4layer()
    found = stage_recipes(
        big, phases=_named(H200_256, H200_128, H200_8), long=_named(H200_128, H200_256, H200_8)
    )
    found |= stage_recipes(
        slice_, phases={f"_{H200_1.suffix}": H200_1}, long={f"_{H200_1.suffix}": H200_1}
    )
    found["mellum2_4layer_pretrain_1gpu_h200_fp8"] = _four_layers
    return found


def stage_recipes(
    training: Training, *, phases: Mapping[str, Hardware], long: Mapping[str, Hardware]
) -> dict[str, Callable[[], Run]]:
    """Return the recipes of a training's stages by name.

    Args:
        training: the four stages.
        phases, long: where the phases and the long-context stage run, by the ending of the recipe's
            name.
    """
    found: dict[str, Callable[[], Run]] = {}
    for number in range(1, len(PHASES) + 1):
        for ending, hardware in phases.items():
            found[training.phase_name(number, ending)] = functools.partial(
                _phase, training, number, ending, hardware
            )
    for ending, hardware in long.items():
        found[f"{training.name}_long_context{ending}"] = functools.partial(
            _long_context, training, ending, hardware
        )
    return found


def _named(*variants: Hardware) -> dict[str, Hardware]:
    return {"": variants[0]} | {f"_{hardware.suffix}": hardware for hardware in variants}


def _phase(training: Training, number: int, ending: str, hardware: Hardware) -> Run:
    """Return phase ``number`` (from 1) of pre-training."""
    whole, phase = training.schedule, PHASES[number - 1]
    before = f"runs/{training.phase_name(number - 1, ending)}" if number > 1 else None
    return Run(
        name=training.phase_name(number, ending),
        description=f"{training.title}, phase {number} of 3 ({phase.name}, {training.tokens[number - 1]}): "
        f"{phase.schedule}, on {hardware.text}.",
        architecture=training.architecture,
        layout=hardware.layout,
        optimizer=training.optimizer,
        loss=Loss(),
        schedule=replace(
            whole, train_samples=training.ends[number - 1], horizon_samples=whole.train_samples
        ),
        precision=training.precision,
        data=training.data[number - 1],
        logging=training.logging,
        checkpoint=Checkpoint(save_interval=training.save_interval, continue_from=before),
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
        }
        | training.sources
        | training.phase_sources,
    )


def _end_source(number: int) -> str:
    if number == len(PHASES):
        return "report App. B: the last of 323,459 steps"
    told = " + ".join(f"{phase.tokens / 1e12:g}T" for phase in PHASES[:number])
    return f"report §3: {told} tokens, rounded up to a whole step"


def _long_context(training: Training, ending: str, hardware: Hardware) -> Run:
    """Return the extension to longer sequences."""
    length, schedule = training.long_data.sequence_length, training.long_schedule
    tokens = schedule.train_samples * length
    amount = f"{tokens / 1e9:.0f}B" if tokens >= 1e9 else f"{tokens / 1e6:.1f}M"
    return Run(
        name=f"{training.name}_long_context{ending}",
        description=f"{training.title}, long context ({amount} tokens at {length >> 10}K, layer-selective YaRN), "
        f"on {hardware.text}.",
        architecture=training.long_architecture,
        layout=hardware.long_layout,
        optimizer=replace(training.optimizer, lr=training.long_lr),
        schedule=schedule,
        precision=training.precision,
        data=training.long_data,
        logging=training.long_logging,
        checkpoint=Checkpoint(
            save_interval=training.long_save_interval,
            load=f"runs/{training.phase_name(len(PHASES), ending)}",
        ),
        sources=_COMMON
        | {
            "architecture.max_position_embeddings": "report §4: 131,072",
            "architecture.rope_full_attention": "report §4: YaRN on the full-attention layers only; released config",
            "layout": "EP 8 and CP 8 as in the report's SFT at the same length (report §5.1); §4 gives none",
            "layout.dp": hardware.long_source,
            "optimizer.lr": "report §4",
            "schedule": "report §4: WHD of 3,500 steps with 500 of decay",
            "schedule.warmup_samples": "ours: 100 steps, as in the report's SFT (§5.1); §4 gives none",
            "schedule.batch_schedule": "report §4: 117B tokens in 3,500 steps of 131,072 tokens make 256 sequences",
            "schedule.micro_batch_size": "ours: one sequence is eight ranks' work",
            "data.sequence_length": "report §4",
            "checkpoint.load": "ours: weights only, since the stage has a schedule of its own",
        }
        | training.sources
        | training.long_sources,
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
            train_steps=2_000,
            warmup_steps=100,
            decay_steps=300,
            batch_sizes=((0, 32), (200, 64)),
            micro_batch_size=2,
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


_COMMON: dict[str, str] = {
    "architecture": "report §2, table Architecture configuration; released config.json",
    "layout.dispatcher": "ours: dropless all-to-all; the report names none",
    "optimizer": "report §3, App. B",
    "optimizer.muon_split_qkv": "Megatron's default; the report does not say",
    "optimizer.muon_split_gate_up": "Megatron's way; the report does not say",
    "optimizer.muon_router": "Megatron's way; the report does not say",
    "optimizer.muon_mtp_projection": "Megatron's way; the report does not say",
    "optimizer.muon_extra_scale": "report §3, after Moonlight (arXiv 2502.16982, §2.2)",
    "loss": "report §3",
    "loss.aux_loss_gradient": "Megatron's, as the report's stack had it: see docs/layouts.md",
    "loss.mtp_factor": "report §2",
    "precision": "report §3: BF16 + FP8 hybrid, tensorwise, gradients reduced in FP32",
    "precision.fp8_param_gather": "not the report's: wrong beside Muon in megatron-core 0.19.2, see rules.py",
    "precision.bf16_first_layers": "the report names no layer that stays in BF16",
    "precision.bf16_last_layers": "the report names no layer that stays in BF16",
    "precision.bf16_mtp_projection": "the report names no layer that stays in BF16",
    "stability": STABILITY,
    "data": OPERATION,
    "logging": OPERATION,
    "checkpoint": OPERATION,
    "seed": OPERATION,
    "backend": OPERATION,
    "timeout_minutes": OPERATION,
}
"""Sources that all of these runs share."""
