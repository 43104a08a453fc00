"""Optimizer: AdamW, or Muon with its update scaled as AdamW's, or as published."""

from ablations.asking import Arm, Claim, Match, Metric, Study

STUDY = Study(
    question="Does Muon train better than AdamW, and at which scale of its update?",
    arms=(
        Arm("adamw", "optimizer.name=adam"),
        Arm("muon_0.2", note="extra scale 0.2: the size of AdamW's updates"),
        Arm("muon_1.0", "optimizer.muon_extra_scale=1.0"),
    ),
    control="adamw",
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02), Metric("step_seconds", delta=0.01)),
    claim=Claim(
        text="Muon is ahead of AdamW on a dense 7B and on a 14B MoE",
        source="report §6",
        expected={"muon_0.2": "better"},
    ),
    note="All arms have one learning rate, which was not tuned for each of them.",
)
