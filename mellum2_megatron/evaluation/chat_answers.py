"""Answers of a chat model to held-out conversations: packs of ``mellum2 data chat``.

Each learnt turn is asked for with the true turns before it, exactly as it was encoded for training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import require_positive_int
from mellum2_megatron.data.tokens.pack_files import PackShard, read_pack_folder
from mellum2_megatron.evaluation.measure import Figure, Measure, Outcome
from mellum2_megatron.evaluation.model import EvaluatedModel

NAME = "chat_answers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the measure.

    Attributes:
        data: folder of `mellum2 data chat`.
        split: its split, default ``valid``: conversations held out of training.
        items: answers to ask for, default 60; all if there are fewer.
        extra_tokens: tokens that an answer may be longer than the true one, default 16.
        seed: seed that draws them, default 1.
    """

    data: str = ""
    split: Literal["valid", "train"] = "valid"
    items: int = 60
    extra_tokens: int = 16
    seed: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt, and the answer that was learnt or held out.

    Attributes:
        prompt: token ids up to the answer.
        answer: its token ids; the last one ends the turn.
    """

    prompt: list[int]
    answer: list[int]


def check(architecture: Mellum2Architecture, settings: Settings) -> None:
    """Check settings against a model.

    Raises:
        InputError: no folder of chat packs, one without the split, ids or packs beyond the model,
            or a number out of range.
    """
    require_positive_int(f"{NAME}.items", settings.items)
    require_positive_int(f"{NAME}.extra_tokens", settings.extra_tokens)
    given = f"{NAME}.data={settings.data}"
    if not settings.data:
        raise InputError(
            f"{NAME}.data", rule="it names no conversations", fix=f"set {NAME}.data=FOLDER"
        )
    folder = read_pack_folder(Path(settings.data), given)
    if "chat" not in folder.facts:
        raise InputError(
            given,
            rule="its packs have no conversations",
            fix="name a folder of `mellum2 data chat`",
        )
    if not folder.packs(settings.split):
        raise InputError(
            given,
            rule=f"it has no {settings.split} split",
            fix=f"make it with --valid-fraction, or set {NAME}.split=train",
        )
    if folder.tokenizer["vocab_size"] > architecture.vocab_size:
        raise InputError(
            given,
            rule=f"its tokenizer has {folder.tokenizer['vocab_size']} entries, the model "
            f"{architecture.vocab_size}",
            fix="make it with the model's own tokenizer",
        )
    if folder.sequence_length > architecture.max_position_embeddings:
        raise InputError(
            given,
            rule=f"its packs have {folder.sequence_length} tokens, the model reads "
            f"{architecture.max_position_embeddings}",
            fix="make it with a smaller --length",
        )


def questions(data: Path, split: str) -> Iterator[Question]:
    """Yield every learnt turn of a folder of chat packs with what stands before it."""
    for prefix in read_pack_folder(data, str(data)).prefixes(split):
        shard = PackShard(prefix)
        for pack in range(len(shard)):
            tokens, counted = np.asarray(shard.tokens(pack)), shard.counted_labels(pack)
            for start, length in zip(*(part.tolist() for part in shard.bounds(pack)), strict=True):
                ids = tokens[start : start + length].tolist()
                # Label t is token t + 1; a turn begins where learning does.
                learnt = [False, *counted[start : start + length - 1].tolist(), False]
                begin = 0
                for place in range(1, length + 1):
                    if learnt[place] and not learnt[place - 1]:
                        begin = place
                    if learnt[place - 1] and not learnt[place]:
                        yield Question(prompt=ids[:begin], answer=ids[begin:place])


def chat_answers(model: EvaluatedModel, settings: Settings) -> Outcome:
    """Ask for held-out answers.

    Returns:
        ``loss`` in nats a token of the true answers, and shares of greedy answers: ``ended``, the
        model ends its turn in time; ``in form``, ended and equal but for what stands in backticks;
        ``right``, equal altogether. One detail an answer.
    """
    asked = list(questions(Path(settings.data), settings.split))
    random.Random(settings.seed).shuffle(asked)
    losses, details = [], []
    for question in asked[: settings.items]:
        end = question.answer[-1]
        [true] = model.score_continuations(question.prompt, [question.answer])
        losses.append(-true.log_probability / len(question.answer))
        given = model.continue_greedily(
            question.prompt,
            max_new_tokens=len(question.answer) + settings.extra_tokens,
            stop=(end,),
        )
        ended = given[-1] == end
        wanted, text = model.decode(question.answer), model.decode(given)
        details.append(
            {
                "wanted": wanted,
                "given": text,
                "ended": ended,
                "in_form": ended and form(text) == form(wanted),
                "right": given == question.answer,
            }
        )
    shares = (("ended", "ended"), ("in form", "in_form"), ("right", "right"))
    return Outcome(
        figures=(
            Figure.mean("loss", losses, "nats a token"),
            *(Figure.share(name, [bool(one[key]) for one in details]) for name, key in shares),
        ),
        details=tuple(details),
    )


def form(text: str) -> str:
    """Return a text with all that stands in backticks taken out of them.

    >>> form("It takes `a, b`.<|im_end|>")
    'It takes ``.<|im_end|>'
    """
    return re.sub(r"`[^`]*`", "``", text)


MEASURE = Measure(
    name=NAME,
    summary="answers to held-out conversations",
    version=1,
    settings=Settings,
    check=check,
    run=chat_answers,
)
