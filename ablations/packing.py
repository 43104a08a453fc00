"""Packing: whole documents by best fit, or one long stream cut at every sequence?"""

from ablations.asking import Arm, Match, Metric, Study
from ablations.asking.packed_data import PACKAGES, packed
from ablations.asking.study import DataSet, Scale

PACKS = packed("packs", "", "the default packing")
PACKED = ("data.document_attention=false",)


def stream(scale: Scale) -> DataSet:
    """Return the documents of the packs as a stream, validated on the packs' own documents."""
    packs = PACKS[scale]
    return DataSet(
        name="stream",
        path=f"data/ablations_{scale}_stream",
        command="mellum2 data prepare --output {path} --format megatron "
        "--tokenizer data/ablations/tokenizer --valid-fraction 0.1 "
        + " ".join(f"--input {{stdlib}}/{package}" for package in PACKAGES)
        if scale == "tiny"
        else "",
        overrides=(f"data.valid=[[1,{packs.path}/phase-1/code]]",),
        after=packs,
        note="`mellum2 data prepare` on the inputs of the plan of the packs",
    )


STUDY = Study(
    question="Does packing whole documents train better than cutting one stream?",
    arms=(
        Arm("stream", PACKED, data={scale: stream(scale) for scale in PACKS}),
        Arm("best_fit", PACKED, data=PACKS),
    ),
    control="stream",
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02),),
    note="All arms attend across documents, so that packing alone differs.",
)
