"""Key heads: how many of 32 query heads share one?"""

from ablations.asking import Arm, Claim, Match, Metric, Study

KEY = "architecture.num_key_value_heads"

STUDY = Study(
    question="How few key-value heads can the attention have?",
    # As many query heads share a key head at each scale: 16, 8 or 4.
    arms=(
        Arm("kv_2", {"tiny": f"{KEY}=1", "proxy": f"{KEY}=1", "full": f"{KEY}=2"}),
        Arm("kv_4", note="as released"),
        Arm("kv_8", {"tiny": f"{KEY}=4", "proxy": f"{KEY}=4", "full": f"{KEY}=8"}),
    ),
    control="kv_4",
    matched=(Match("tokens"), Match("parameters", tolerance=0.05)),
    metrics=(Metric("valid_loss", delta=0.02),),
    claim=Claim(text="4 key-value heads are the choice among 2, 4 and 8", source="report §6"),
)
