"""Optimizer: AdamW at three learning rates, and Muon at two scales of its update."""

from collections.abc import Mapping

from ablations.asking import Arm, Claim, Match, Metric, Scale, Study

ADAM = "optimizer.name=adam"


def adam_at(share: float) -> Mapping[Scale, tuple[str, ...]]:
    """Return AdamW at a share of the base's learning rate."""
    rates: Mapping[Scale, float] = {"tiny": 4e-3, "proxy": 1e-3, "full": 3e-4}
    return {scale: (ADAM, f"optimizer.lr={rate * share:g}") for scale, rate in rates.items()}


STUDY = Study(
    question="Does Muon train better than AdamW, and at which scale of its update?",
    arms=(
        Arm("muon_0.2", note="extra scale 0.2: the size of AdamW's updates"),
        Arm("muon_1.0", "optimizer.muon_extra_scale=1.0"),
        Arm("adamw", ADAM),
        Arm("adamw_quarter", adam_at(1 / 4)),
        Arm("adamw_sixteenth", adam_at(1 / 16)),
    ),
    control="muon_0.2",
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02), Metric("step_seconds", delta=0.01)),
    claim=Claim(
        text="Muon is ahead of AdamW on a dense 7B and on a 14B MoE",
        source="report §6",
        expected={"adamw": "worse", "adamw_quarter": "worse", "adamw_sixteenth": "worse"},
    ),
    note="adamw has Muon's learning rate, the next two a lower one. Muon's was not tuned.",
)
