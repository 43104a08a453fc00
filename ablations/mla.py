"""Latent attention: are keys and values of a short latent as good as those of few heads?"""

from ablations.asking import Arm, Claim, Match, Metric, Study

KEY = "architecture.latent_attention"
WIDTHS = "{{kv_lora_rank: {}, qk_nope_head_dim: {}, qk_rope_head_dim: {}, v_head_dim: {}}}"

STUDY = Study(
    question="Does latent attention serve as well as grouped queries, at equal parameters?",
    arms=(
        Arm("gqa", note="as released"),
        Arm(
            "mla",
            {
                # Queries as wide as the control's, half of each rotated; the latent as wide as
                # equal parameters allow. It keeps a third of the control's keys and values.
                "tiny": (f"{KEY}={WIDTHS.format(14, 8, 8, 16)}",),
                "proxy": (f"{KEY}={WIDTHS.format(128, 64, 64, 128)}",),
                "full": (f"{KEY}={WIDTHS.format(256, 64, 64, 128)}",),
            },
            note="all heads' keys and values from one latent",
        ),
    ),
    control="gqa",
    matched=(
        Match("tokens"),
        Match("parameters", tolerance=0.01),
        Match("active_parameters", tolerance=0.01),
        Match("flops", tolerance=0.01),
    ),
    metrics=(Metric("valid_loss", delta=0.02), Metric("step_seconds", delta=0.01)),
    claim=Claim(text="grouped queries are the choice over latent attention", source="report §6"),
    note="A model with latent attention cannot be exported (docs/variants.md).",
)
