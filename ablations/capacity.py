"""Capacity: may an expert that is full drop tokens?"""

from ablations.asking import Arm, Claim, Match, Metric, Study

STUDY = Study(
    question="What does a limit on each expert's tokens cost, and save?",
    arms=(
        Arm("dropless", note="as released"),
        Arm("capacity_1.0", "loss.capacity_factor=1.0"),
        Arm("capacity_1.25", "loss.capacity_factor=1.25"),
        Arm("capacity_1.5", "loss.capacity_factor=1.5"),
    ),
    control="dropless",
    matched=(Match("tokens"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02), Metric("step_seconds", delta=0.01)),
    claim=Claim(
        text="dropless is the choice over capacity factors from 1.0 to 1.5",
        source="report §6",
        expected={"capacity_1.0": "worse"},
    ),
)
