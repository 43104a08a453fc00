"""Fill in the middle: cut documents between characters, or between tokens?"""

from ablations.asking import Arm, Match, Metric, Study
from ablations.asking.packed_data import packed

STUDY = Study(
    question="Does it matter where a document is cut for fill-in-the-middle?",
    arms=(
        Arm("character", data=packed("fim_50", "fim: {rate: 0.5}", "fim.rate 0.5")),
        Arm(
            "token",
            data=packed("fim_token", "fim: {rate: 0.5, level: token}", "fim.level token"),
        ),
    ),
    control="character",
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("fim_exact_match", delta=0.02), Metric("valid_loss", delta=0.02)),
)
