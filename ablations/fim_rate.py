"""Fill in the middle: which share of the documents may be reordered?"""

from ablations.asking import Arm, Claim, Match, Metric, Study
from ablations.asking.packed_data import packed

STUDY = Study(
    question="What does fill-in-the-middle training cost left to right?",
    arms=(
        Arm("fim_0", data=packed("fim_0", "fim: {rate: 0}", "fim.rate 0")),
        Arm("fim_10", data=packed("fim_10", "fim: {rate: 0.1}", "fim.rate 0.1")),
        Arm("fim_50", data=packed("fim_50", "fim: {rate: 0.5}", "fim.rate 0.5"), note="phase 1"),
    ),
    control="fim_0",
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02), Metric("fim_exact_match", delta=0.02)),
    claim=Claim(
        text="FIM at 50%, 10% and 50% of code in the three phases", source="report §3", expected={}
    ),
    note="Validation has no FIM: the loss is left to right in every arm.",
)
