"""Code tasks: the line that was taken out of a file, by completion and by filling in the middle.

- ``completion``: the model sees the text before a line, as at a cursor at the end of a file.
- ``fim``: it also sees what follows, in the order of its training (`FimRole`), and the cut lies
  inside the line.

The answer is the greedy text up to the line's end. Three figures are taken: ``exact`` (equal but
for blanks at the ends), ``similarity`` (1 - edit distance / longer length, over characters), and
``parses`` (Python reads the file with the answer in place).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import require_positive_int
from mellum2_megatron.data.corpus.parse_filters import python_fault
from mellum2_megatron.data.tokens.fill_in_middle import FimRole, FimSettings, Sentinels, join
from mellum2_megatron.evaluation.held_out import CutText, cut_lines
from mellum2_megatron.evaluation.measure import Figure, Measure, Outcome
from mellum2_megatron.evaluation.model import EvaluatedModel

COMPLETION, FIM = "completion", "fim"
_ROOM = 12
"""Tokens that an answer may have beyond those of the right one."""
_SENTINELS = 3
_NO_SENTINELS = "not measured: the tokenizer has no fill-in-the-middle tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionSettings:
    """Settings of ``completion``.

    Attributes:
        items: lines asked for, default 40.
        text: Python files or folders kept out of training; default: blocks of this project.
        seed: seed of the lines, default 1.
    """

    items: int = 40
    text: tuple[str, ...] = ()
    seed: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class FimTaskSettings:
    """Settings of ``fim``.

    Attributes:
        items: parts of lines asked for, default 40.
        order: ``spm`` (default), suffix first as the released base models are prompted, or ``psm``.
        text: Python files or folders kept out of training; default: blocks of this project.
        seed: seed of lines and cuts, default 1.
    """

    items: int = 40
    order: Literal["spm", "psm"] = "spm"
    text: tuple[str, ...] = ()
    seed: int = 1


def check_completion(_model: Mellum2Architecture, settings: CompletionSettings) -> None:
    """Refuse a number of items that is not positive."""
    require_positive_int(f"{COMPLETION}.items", settings.items)


def check_fim(_model: Mellum2Architecture, settings: FimTaskSettings) -> None:
    """Refuse settings that ask for nothing, or in an unknown order."""
    require_positive_int(f"{FIM}.items", settings.items)
    if settings.order not in ("spm", "psm"):
        raise InputError(
            f"{FIM}.order={settings.order}", rule="no such order", fix="use spm or psm"
        )


def completion_cuts(settings: CompletionSettings) -> list[CutText]:
    """Return the items of ``completion``."""
    return cut_lines(
        COMPLETION, settings.text, items=settings.items, seed=settings.seed, inside=False
    )


def fim_cuts(settings: FimTaskSettings) -> list[CutText]:
    """Return the items of ``fim``."""
    return cut_lines(FIM, settings.text, items=settings.items, seed=settings.seed, inside=True)


def completion(model: EvaluatedModel, settings: CompletionSettings) -> Outcome:
    """Ask for lines from the text before them."""
    cuts = completion_cuts(settings)
    return _ask(model, cuts, [model.encode(cut.before) for cut in cuts])


def fim(model: EvaluatedModel, settings: FimTaskSettings) -> Outcome:
    """Ask for parts of lines from the text around them; nothing without sentinels, with a note."""
    special = model.special_ids
    if not all(f"fim_{part}" in special for part in ("prefix", "middle", "suffix")):
        return Outcome(figures=(), notes=(_NO_SENTINELS,))
    sentinels = Sentinels(
        prefix=special["fim_prefix"], middle=special["fim_middle"], suffix=special["fim_suffix"]
    )
    role = FimRole.SPM if settings.order == "spm" else FimRole.PSM
    cuts, prompts = fim_cuts(settings), []
    for cut in cuts:
        prefix, suffix = (
            np.array(model.encode(part), dtype=np.int64) for part in (cut.before, cut.after)
        )
        # The far ends of both parts go first where the context is short; three sentinels stay.
        room = model.architecture.max_position_embeddings - _most(model, cut) - _SENTINELS
        behind = min(len(suffix), max(room // 2, room - len(prefix)))
        prefix, suffix = prefix[max(0, len(prefix) - room + behind) :], suffix[:behind]
        none = np.array([], dtype=np.int64)
        ids = join((prefix, none, suffix), role, sentinels, FimSettings())
        prompts.append([int(token) for token in ids])
    return _ask(model, cuts, prompts)


def _ask(model: EvaluatedModel, cuts: Sequence[CutText], prompts: Sequence[list[int]]) -> Outcome:
    stop = set(model.special_ids.values())
    most = [_most(model, cut) for cut in cuts]
    # Code before a line loses its beginning where the context is short.
    longest = model.architecture.max_position_embeddings
    kept = [prompt[-(longest - count) :] for prompt, count in zip(prompts, most, strict=True)]
    details: list[dict[str, Any]] = []
    for cut, ids in zip(cuts, model.continue_all(kept, most=most, stop=stop), strict=True):
        if ids and ids[-1] in stop:
            ids = ids[:-1]
        answer = model.decode(ids).partition("\n")[0]
        details.append(
            {
                "expected": cut.middle,
                "answer": answer,
                "exact": answer.strip() == cut.middle.strip(),
                "similarity": edit_similarity(answer.strip(), cut.middle.strip()),
                "parses": python_fault(cut.before + answer + cut.after) is None,
            }
        )
    return Outcome(
        figures=(
            Figure.share("exact", [item["exact"] for item in details]),
            Figure.mean("similarity", [item["similarity"] for item in details], "share"),
            Figure.share("parses", [item["parses"] for item in details]),
        ),
        details=tuple(details),
    )


def _most(model: EvaluatedModel, cut: CutText) -> int:
    """Return the number of tokens that an answer may have."""
    return len(model.encode(cut.middle)) + _ROOM


def edit_similarity(first: str, second: str) -> float:
    """Return 1 - edit distance / length of the longer text; 1 for two empty texts.

    >>> edit_similarity("kitten", "sitting")
    0.5714285714285714
    """
    row = list(range(len(second) + 1))
    for place, letter in enumerate(first, 1):
        # Levenshtein's table, a row at a time: insert, delete, replace.
        following = [place]
        for column, other in enumerate(second, 1):
            replaced = row[column - 1] + (letter != other)
            following.append(min(following[-1] + 1, row[column] + 1, replaced))
        row = following
    longest = max(len(first), len(second))
    return 1 - row[-1] / longest if longest else 1.0


def texts_of(cuts: Sequence[CutText]) -> list[str]:
    """Return the text of each item as a training document would hold it."""
    return [cut.before + cut.middle + cut.after for cut in cuts]


COMPLETION_MEASURE = Measure(
    name=COMPLETION,
    summary="lines of held-out code, from the text before them",
    version=1,
    settings=CompletionSettings,
    check=check_completion,
    run=completion,
    texts=lambda settings: texts_of(completion_cuts(settings)),
)
FIM_MEASURE = Measure(
    name=FIM,
    summary="parts of lines of held-out code, from the text around them",
    version=1,
    settings=FimTaskSettings,
    check=check_fim,
    run=fim,
    texts=lambda settings: texts_of(fim_cuts(settings)),
)
