"""Muon and SwiGLU: orthogonalise the gate and up projections together, or each by itself?"""

from ablations.asking import Arm, Match, Metric, Study

STUDY = Study(
    question="Does Muon train experts better with gate and up projections apart?",
    arms=(
        Arm("together", note="one matrix, as Megatron keeps them"),
        Arm("apart", "optimizer.muon_split_gate_up=true"),
    ),
    control="together",
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02),),
    note="The report does not say which of the two the released models were trained with.",
)
