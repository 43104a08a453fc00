"""Period: after how many sliding layers comes a full one?"""

from ablations.asking import Arm, Match, Metric, Scale, Study

LAYERS: dict[Scale, int] = {"tiny": 4, "proxy": 12, "full": 28}


def every(period: int) -> dict[Scale, tuple[str, ...]]:
    """Return the overrides that make each ``period``-th layer full."""
    kinds = ("full_attention", "sliding_attention")
    return {
        scale: (
            "architecture.layer_types=["
            + ",".join(kinds[bool((layer + 1) % period)] for layer in range(layers))
            + "]",
        )
        for scale, layers in LAYERS.items()
    }


STUDY = Study(
    question="How many of the layers need to see the whole sequence?",
    arms=(
        Arm("every_2", every(2)),
        Arm("every_4", note="three sliding layers and a full one, as released"),
        Arm("none", every(1_000), note="sliding layers only"),
    ),
    control="every_4",
    matched=(Match("tokens"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02), Metric("loss_late", delta=0.02)),
)
