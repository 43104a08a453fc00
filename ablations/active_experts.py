"""Active experts: how many of 64 does a token use?"""

from ablations.asking import Arm, Claim, Match, Metric, Study

STUDY = Study(
    question="How much does a token lose if it uses 2 or 4 experts in place of 8?",
    arms=(
        Arm("top_2", "architecture.num_experts_per_tok=2"),
        Arm("top_4", "architecture.num_experts_per_tok=4"),
        Arm("top_8", "architecture.num_experts_per_tok=8", note="as released"),
    ),
    control="top_8",
    # 64 small experts at the tiny scale too, so that the arms are the report's.
    common={"tiny": ("architecture.num_experts=64", "architecture.moe_intermediate_size=16")},
    matched=(Match("tokens"), Match("parameters")),
    metrics=(
        Metric("valid_loss", delta=0.02),
        Metric("step_seconds", delta=0.01),
        Metric("expert_load", delta=0.2),
    ),
    claim=Claim(
        text="2 active experts are about 1.5 times as fast as 8",
        source="report §6",
        expected={"top_2": "worse"},
    ),
)
