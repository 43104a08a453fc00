"""Gradient of the global load-balancing loss: Megatron's, or the exact one?"""

from ablations.asking import Arm, Match, Metric, Study

STUDY = Study(
    question="Does the router balance better with the exact gradient of its loss?",
    arms=(
        Arm("megatron", note="divided by the number of data-parallel ranks once too often"),
        Arm("exact", "loss.aux_loss_gradient=exact"),
    ),
    control="megatron",
    # On one rank the two are the same.
    common={
        "tiny": ("layout.dp=2", "schedule.micro_batch_size=4"),
        "proxy": ("layout.dp=8",),
    },
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("expert_load", delta=0.1), Metric("valid_loss", delta=0.02)),
    note="The effect grows with the number of ranks: 2 at tiny, 8 at proxy, 64 at full scale.",
)
