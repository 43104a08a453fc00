"""Packed data of the studies on packing, documents and FIM, each made by a corpus plan.

All have the same documents in training and in validation; FIM and packing alone differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ablations.asking.scales import TINY_DATA
from ablations.asking.study import DataSet, Scale

PACKAGES = "asyncio email http importlib json multiprocessing unittest urllib xml".split()
"""Packages of Python's own library that the tiny scale packs, about 2 MB."""

HELD_OUT = "concurrent ctypes logging xmlrpc".split()
"""Other packages, for validation where the arms split their documents in different ways."""

_PLAN = """\
# Packages of Python's own library, packed for the tiny scale of the ablations.
name: {name}
tokenizer: ablations/tokenizer
sources:
  code: {{kind: code, inputs: [{inputs}], near_duplicates: false, max_epochs: 1,
         filters: {{LineLength: null, ByteEntropy: null, LetterShare: null, CommentShare: null}}}}
phases:
  - {{tokens: {tokens}, sequence_length: 256, unique_tokens: 8, mixture: {{code: 100}}{settings}}}
unique_tokens: 16
valid_share: {valid_share}
margin: 0.1
"""


def packed(
    name: str,
    settings: str,
    note: str,
    *,
    packages: Sequence[str] = PACKAGES,
    tokens: int = 260_000,
    valid_share: float = 0.1,
) -> Mapping[Scale, DataSet]:
    """Return the data of an arm at all scales.

    Args:
        name: name of the data set.
        settings: settings of the plan's phase, such as ``packing: drop``; empty: the default.
        note: the same in words, for the plans of the larger scales, which the user writes.
        packages: packages of Python's own library that the tiny scale packs.
        tokens: training tokens of the tiny scale.
        valid_share: share of the tiny scale's documents that are held out.
    """
    extra = f", {settings}" if settings else ""

    def own(scale: Scale) -> DataSet:
        return DataSet(
            name=name,
            path=f"data/ablations_{scale}_{name}",
            overrides=("data.phase=1",),
            note=f"a corpus plan (docs/corpus_plans.md) whose phase 1 has {note}",
        )

    return {
        "tiny": DataSet(
            name=name,
            path=f"data/ablations_{name}",
            command="mellum2 data run {path}.yaml",
            overrides=("data.phase=1",),
            plan=_PLAN.format(
                name=name,
                settings=extra,
                tokens=tokens,
                valid_share=valid_share,
                inputs=", ".join(f"{{stdlib}}/{package}" for package in packages),
            ),
            after=TINY_DATA,
        ),
        "proxy": own("proxy"),
        "full": own("full"),
    }
