"""Balancing: which rule spreads the tokens over the experts?"""

from ablations.asking import Arm, Claim, Match, Metric, Study

STUDY = Study(
    question="Which way of balancing the experts costs least loss?",
    arms=(
        Arm("global", note="a loss over all tokens of a step, as released"),
        Arm("sequence", "loss.aux_loss_type=seq_aux_loss", note="a loss within each sequence"),
        Arm(
            "bias",
            "loss.aux_loss_type=none loss.bias_update_rate=1e-3",
            note="no loss; a bias on the choice of experts",
        ),
        Arm("none", "loss.aux_loss_type=none", note="nothing balances"),
    ),
    control="global",
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02), Metric("expert_load", delta=0.2)),
    claim=Claim(
        text="the global loss is the choice over per-sequence and auxiliary-loss-free balancing",
        source="report §6",
    ),
    note="A model trained with the bias cannot be exported (docs/variants.md).",
)
