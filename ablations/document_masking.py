"""Documents: may a token attend to the other documents of its pack?"""

from ablations.asking import Arm, Match, Metric, Study
from ablations.asking.packed_data import packed

STUDY = Study(
    question="Does attention within documents train better than attention across them?",
    arms=(
        Arm("across", "data.document_attention=false"),
        Arm("within", "data.document_attention=true"),
    ),
    control="across",
    data=packed("packs", "", "the default packing"),
    matched=(Match("tokens"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02),),
    note="Each arm is validated as it was trained; without other documents in sight a document's "
    "first tokens are harder.",
)
