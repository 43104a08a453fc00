"""Window: how many keys does a sliding layer see?"""

from ablations.asking import Arm, Claim, Match, Metric, Scale, Study

KEY = "architecture.sliding_window"
LAYERS: dict[Scale, int] = {"tiny": 4, "proxy": 12, "full": 28}


def all_full(layers: int) -> tuple[str, ...]:
    """Return the overrides that leave no sliding layer."""
    types = ",".join(["full_attention"] * layers)
    return (f"architecture.layer_types=[{types}]", "architecture.mtp_layer_types=[full_attention]")


STUDY = Study(
    question="How small can the window of the sliding layers be?",
    # A sixteenth and an eighth of the sequence, at each scale.
    arms=(
        Arm("window_512", {"tiny": f"{KEY}=16", "proxy": f"{KEY}=512", "full": f"{KEY}=512"}),
        Arm("window_1024", note="as released: an eighth of the sequence"),
        Arm("full", {scale: all_full(layers) for scale, layers in LAYERS.items()}),
    ),
    control="window_1024",
    matched=(Match("tokens"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02), Metric("loss_late", delta=0.02)),
    claim=Claim(
        text="a window of 1,024 in three of four layers is the choice over 512",
        source="report §6",
        expected={"window_512": "worse"},
    ),
)
