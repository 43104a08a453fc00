"""Interleaving: must every layer be sparse, or is a dense one in turn as good?"""

from ablations.asking import Arm, Claim, Match, Metric, Study

STUDY = Study(
    question="Do dense layers between the sparse ones serve as well as experts in all layers?",
    arms=(
        Arm("all_sparse", note="as released"),
        Arm(
            "dense_in_turn",
            {
                # As wide as a token's experts together, so that active parameters match.
                "tiny": (
                    "architecture.mlp_layer_types=[dense,sparse]",
                    "architecture.intermediate_size=96",
                ),
                "proxy": (
                    "architecture.mlp_layer_types=[dense,sparse]",
                    "architecture.intermediate_size=3072",
                ),
                "full": (
                    "architecture.mlp_layer_types=[dense,sparse]",
                    "architecture.intermediate_size=7168",
                ),
            },
            note="every other layer dense; half the experts",
        ),
    ),
    control="all_sparse",
    matched=(
        Match("tokens"),
        Match("active_parameters", tolerance=0.02),
        Match("flops", tolerance=0.02),
    ),
    metrics=(Metric("valid_loss", delta=0.02), Metric("step_seconds", delta=0.01)),
    claim=Claim(text="sparse layers throughout are the choice", source="report §6"),
)
