"""Shared expert: is one expert that every token uses worth a routed one?"""

from ablations.asking import Arm, Claim, Match, Metric, Study

STUDY = Study(
    question="Does an expert that all tokens share serve better than one more routed expert?",
    arms=(
        Arm("routed_only", note="as released"),
        Arm(
            "shared",
            {
                "tiny": (
                    "architecture.shared_expert_intermediate_size=48",
                    "architecture.num_experts_per_tok=1",
                ),
                "proxy": (
                    "architecture.shared_expert_intermediate_size=384",
                    "architecture.num_experts_per_tok=7",
                ),
                "full": (
                    "architecture.shared_expert_intermediate_size=896",
                    "architecture.num_experts_per_tok=7",
                ),
            },
            note="as wide as a routed expert, and one routed expert less",
        ),
    ),
    control="routed_only",
    matched=(Match("tokens"), Match("active_parameters"), Match("flops")),
    metrics=(Metric("valid_loss", delta=0.02), Metric("expert_load", delta=0.2)),
    claim=Claim(text="no shared expert is the choice", source="report §6"),
    note="A model with a shared expert cannot be exported (docs/variants.md).",
)
