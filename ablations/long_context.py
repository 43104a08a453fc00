"""Long context: YaRN on the full-attention layers, on all layers, or nowhere?"""

import math
from dataclasses import replace

from ablations.asking import Arm, Claim, Match, Metric, Study
from ablations.asking.scales import proxy, tiny
from mellum2_megatron.architecture import RopeParameters
from mellum2_megatron.config import Run, Schedule

FULL, SLIDING = "architecture.rope_full_attention", "architecture.rope_sliding_attention"
FACTOR = 4


def longer(base: Run) -> Run:
    """Return a stage at four times the length, from the weights of ``base``."""
    native, length = base.architecture.max_position_embeddings, FACTOR * base.data.sequence_length
    batch = max(1, base.schedule.final_batch_size // FACTOR)
    return replace(
        base,
        architecture=base.architecture.replace(
            max_position_embeddings=FACTOR * native,
            rope_full_attention=RopeParameters(
                rope_type="yarn",
                rope_theta=base.architecture.rope_full_attention.rope_theta,
                factor=float(FACTOR),
                original_max_position_embeddings=native,
                attention_factor=0.1 * math.log(FACTOR) + 1,
            ),
        ),
        optimizer=replace(base.optimizer, lr=base.optimizer.lr / 10),
        schedule=Schedule.from_steps(
            train_steps=base.schedule.train_steps // 6,
            warmup_steps=2,
            decay_steps=base.schedule.train_steps // 24,
            batch_sizes=((0, batch),),
            micro_batch_size=1,
        ),
        data=replace(base.data, sequence_length=length),
        logging=replace(
            base.logging,
            eval_interval=base.schedule.train_steps // 6,
            eval_batch_size=batch,
        ),
    )


def tiny_long() -> Run:
    """Return the stage at the tiny scale: 256 -> 1,024 tokens."""
    return longer(tiny())


def proxy_long() -> Run:
    """Return the stage at the proxy scale: 8K -> 32K tokens."""
    return longer(proxy())


def uniform(native: int) -> tuple[str, ...]:
    """Return the overrides that put YaRN on the sliding layers too."""
    return (
        f"{SLIDING}.rope_type=yarn",
        f"{SLIDING}.factor={FACTOR}",
        f"{SLIDING}.original_max_position_embeddings={native}",
    )


STUDY = Study(
    question="Which layers need YaRN when the context grows?",
    arms=(
        Arm("none", f"{FULL}.factor=1 {FULL}.attention_factor=1", note="factor 1 is plain RoPE"),
        Arm("selective", note="full-attention layers only, as released"),
        Arm("uniform", {"tiny": uniform(256), "proxy": uniform(8192)}),
    ),
    control="none",
    bases={"tiny": tiny_long, "proxy": proxy_long},
    starts_from={"tiny": tiny, "proxy": proxy},
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(
        Metric("loss_late", delta=0.02),
        Metric("valid_loss", delta=0.02),
        Metric("needle", delta=0.05),
    ),
    claim=Claim(
        text="RULER at 64K: layer-selective YaRN 0.64, uniform theta 0.52, unchanged 0.33",
        source="report §4",
        expected={"selective": "better"},
    ),
)
