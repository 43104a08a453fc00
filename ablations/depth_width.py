"""Shape: deep and narrow, or shallow and wide, at as many parameters?"""

from ablations.asking import Arm, Claim, Match, Metric, Study


def sizes(layers: int, hidden: int, experts: int) -> tuple[str, ...]:
    """Return the overrides of a shape; the experts' width makes the parameters match."""
    return (
        f"architecture.num_hidden_layers={layers}",
        f"architecture.hidden_size={hidden}",
        f"architecture.moe_intermediate_size={experts}",
    )


TWO_LAYERS = (
    "architecture.num_hidden_layers=2",
    "architecture.layer_types=[sliding_attention,full_attention]",
    "architecture.hidden_size=192",
)
"""The wide arm at the tiny scale, which is too shallow for a whole period of layers."""


STUDY = Study(
    question="Is a deep, narrow model better than a shallow, wide one?",
    arms=(
        Arm(
            "deep",
            {
                "tiny": sizes(8, 96, 32),
                "proxy": sizes(20, 768, 384),
                "full": sizes(40, 1920, 768),
            },
        ),
        Arm("as_released"),
        Arm(
            "wide",
            {
                "tiny": TWO_LAYERS,
                "proxy": sizes(8, 1280, 384),
                "full": sizes(20, 2816, 1024),
            },
        ),
    ),
    control="as_released",
    matched=(Match("tokens"), Match("parameters", tolerance=0.15)),
    metrics=(Metric("valid_loss", delta=0.02), Metric("step_seconds", delta=0.01)),
    claim=Claim(
        text="depths of 24 to 40 and widths of 2,304 to 4,096 compared", source="report §6"
    ),
)
