"""Precision: FP8 matrix multiplications against BF16."""

from ablations.asking import Arm, Match, Metric, Study
from ablations.asking.scales import full, proxy

STUDY = Study(
    question="Does FP8 cost loss, and how much time does it save?",
    arms=(
        Arm("bf16", "precision.compute=bf16"),
        Arm("fp8", "precision.compute=fp8", note="tensorwise scales, as the report"),
    ),
    control="bf16",
    bases={"proxy": proxy, "full": full},
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.005), Metric("step_seconds", delta=0.01)),
    gpu="FP8 exists in Transformer Engine on GPUs only, so there is no tiny scale",
)
