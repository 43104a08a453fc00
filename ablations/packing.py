"""Packing: whole documents by best fit, or one long stream cut at every sequence?"""

from dataclasses import replace

from ablations.asking import Arm, Match, Metric, Study
from ablations.asking.packed_data import HELD_OUT, PACKAGES, packed
from ablations.asking.study import DataSet, Scale

PACKED = ("data.document_attention=false",)

HELD = packed(
    "held_out",
    "",
    "documents that neither arm trains on",
    packages=HELD_OUT,
    tokens=40_000,
    valid_share=0.5,
)


def validated(data: DataSet, scale: Scale) -> DataSet:
    """Return data that are validated on other documents than its own.

    A stream and a plan split the same documents in different ways, so the documents that one holds
    out are training data of the other.
    """
    held = HELD[scale]
    valid = f"data.valid=[[1,{held.path}/phase-1/code]]"
    return replace(data, overrides=(*data.overrides, valid), after=held)


def stream(scale: Scale) -> DataSet:
    """Return the documents of the packs as a stream."""
    return DataSet(
        name="stream",
        path=f"data/ablations_{scale}_stream",
        command="mellum2 data prepare --output {path} --format megatron "
        "--tokenizer data/ablations/tokenizer --valid-fraction 0.1 "
        + " ".join(f"--input {{stdlib}}/{package}" for package in PACKAGES)
        if scale == "tiny"
        else "",
        note="`mellum2 data prepare` on the inputs of the plan of the packs",
    )


PACKS = packed("packs", "", "the default packing")

STUDY = Study(
    question="Does packing whole documents train better than cutting one stream?",
    arms=(
        Arm("stream", PACKED, data={scale: validated(stream(scale), scale) for scale in PACKS}),
        Arm("best_fit", PACKED, data={scale: validated(PACKS[scale], scale) for scale in PACKS}),
    ),
    control="stream",
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02),),
    note="All arms attend across documents, so that packing alone differs. All are validated on "
    "documents of other packages.",
)
