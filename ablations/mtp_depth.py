"""MTP depth: does a layer that predicts one token further add to the first?"""

from ablations.asking import Arm, Match, Metric, Study

STUDY = Study(
    question="Does a second multi-token-prediction layer lower the loss of the next token?",
    arms=(
        Arm("one", note="one MTP layer at weight 0.1, as released"),
        Arm("two", "architecture.num_mtp_layers=2", note="each at weight 0.05"),
    ),
    control="one",
    matched=(Match("tokens"),),
    metrics=(Metric("valid_loss", delta=0.02), Metric("step_seconds", delta=0.01)),
    note="A model with two layers cannot be exported (docs/variants.md).",
)
