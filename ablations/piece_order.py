"""Best-fit order: the pieces of a pack at random, or by length as best fit places them?"""

from collections.abc import Mapping
from dataclasses import replace

from ablations.asking import Arm, Match, Metric, Study
from ablations.asking.packed_data import packed
from ablations.asking.study import SCALES, DataSet, Scale

PACKS = packed("packs", "", "the default packing")


def ordered(order: str) -> Mapping[Scale, DataSet]:
    """Return the same packs with their pieces in another order, validated on those of `PACKS`."""
    own = packed(order, f"piece_order: {order}", f"piece_order {order}")
    return {
        scale: replace(
            data,
            overrides=(*data.overrides, f"data.valid=[[1,{PACKS[scale].path}/phase-1/code]]"),
            after=PACKS[scale],
        )
        for scale, data in own.items()
    }


STUDY = Study(
    question="Does the order of the documents in a pack matter?",
    arms=(
        Arm("random", data=PACKS),
        Arm("longest_first", data=ordered("longest_first"), note="as best fit places them"),
        Arm("shortest_first", data=ordered("shortest_first")),
    ),
    control="random",
    common=dict.fromkeys(SCALES, ("data.document_attention=false",)),
    matched=(Match("tokens"), Match("flops"), Match("parameters")),
    metrics=(Metric("valid_loss", delta=0.02),),
    note="All arms attend across documents: within documents the order could change nothing.",
)
