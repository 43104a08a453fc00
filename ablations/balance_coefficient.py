"""Balance: how strongly must the router be pushed to use its experts evenly?"""

from ablations.asking import Arm, Claim, Match, Metric, Study

STUDY = Study(
    question="Which coefficient of the load-balancing loss balances without a cost in loss?",
    arms=(
        Arm("coef_1e-2", "loss.aux_loss_coef=1e-2"),
        Arm("coef_1e-3", note="as in the report's pre-training"),
        Arm("coef_1e-4", "loss.aux_loss_coef=1e-4"),
    ),
    control="coef_1e-3",
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02), Metric("expert_load", delta=0.2)),
    claim=Claim(text="1e-3 is the choice over 1e-2", source="report §6"),
)
