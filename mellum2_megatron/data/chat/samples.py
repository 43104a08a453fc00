"""Conversations to samples: token ids, and for each token whether it is learnt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mellum2_megatron.data.chat.masks import Span, learnt_spans
from mellum2_megatron.data.chat.records import Conversation, RecordError
from mellum2_megatron.data.chat.template import ChatTemplate, Mode
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNFOLDED = 5
"""Most samples of a conversation in thinking mode (report §5.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A sample.

    Attributes:
        tokens: ids, `[n]`; the last one is learnt.
        learnt: true where the token counts when it is predicted, `[n]`.
    """

    tokens: npt.NDArray[np.int32]
    learnt: npt.NDArray[np.bool_]


class SampleMaker:
    """Makes samples of conversations.

    Args:
        tokenizer: Hugging Face tokenizer folder.
        template: chat template.
        mode: ``instruct``: one sample, all turns of the assistant are learnt, without reasoning.
            ``thinking``: a sample for each of the last `UNFOLDED` turns with reasoning; that turn
            is learnt, and the conversation ends there.
    """

    def __init__(self, tokenizer: Path, template: ChatTemplate, mode: Mode) -> None:
        self.template, self.mode = template, mode
        self._tokenizer = chat_tokenizer(tokenizer)
        self._special = special_pattern(self._tokenizer)

    def samples(self, conversation: Conversation) -> list[Sample]:
        """Return a conversation's samples; none for one without reasoning in thinking mode.

        Raises:
            RecordError: it spells a special token, or the template does not fit it.
        """
        self._check_texts(conversation)
        return [self._sample(part) for part in self._parts(conversation)]

    def _parts(self, conversation: Conversation) -> Iterator[Conversation]:
        messages = conversation.messages
        if self.mode == "instruct":
            bare = tuple(dataclasses.replace(message, reasoning=None) for message in messages)
            yield dataclasses.replace(conversation, messages=bare)
            return
        turns = [i for i, message in enumerate(messages) if message.reasoning is not None]
        for turn in turns[-UNFOLDED:]:
            yield dataclasses.replace(conversation, messages=messages[: turn + 1])

    def _sample(self, conversation: Conversation) -> Sample:
        text, spans = learnt_spans(
            self.template, conversation, self._special, last_only=self.mode == "thinking"
        )
        tokens, learnt = encode_spans(self._tokenizer, text, spans)
        if not learnt.any() or learnt.all():
            raise RecordError(
                f"{'no' if not learnt.any() else 'every'} token is learnt: the template's mask is "
                "wrong"
            )
        # What follows the last learnt token is no context of anything.
        end = int(np.flatnonzero(learnt)[-1]) + 1
        return Sample(tokens=tokens[:end], learnt=learnt[:end])

    def _check_texts(self, conversation: Conversation) -> None:
        """Refuse texts that spell a special token: one in a question would forge a turn."""
        for number, message in enumerate(conversation.messages, 1):
            for text in (
                message.content,
                message.reasoning or "",
                *message.more.values(),
                *map(_as_json, message.tool_calls),
            ):
                self._check_text(text, f"message {number} ({message.role})")
        for tool in conversation.tools:
            self._check_text(_as_json(tool), "'tools'")

    def _check_text(self, text: str, where: str) -> None:
        found = self._special.search(text)
        if found is not None:
            raise RecordError(f"{where} spells the special token {found.group()!r}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            # JSON can spell half of a surrogate pair, which is no character.
            raise RecordError(
                f"{where} has the lone surrogate \\u{ord(text[error.start]):04x}"
            ) from None


def _as_json(value: dict[str, Any]) -> str:
    """Return a call or a tool as JSON.

    Raises:
        RecordError: it has NaN or infinity, which Python's reader takes and JSON lacks.
    """
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        raise RecordError("a tool or a call has a number that is not finite") from None


def chat_tokenizer(folder: Path) -> Tokenizer:
    """Return a folder's tokenizer, which reads special tokens as such, with offsets untrimmed."""
    from tokenizers import processors

    tokenizer = load_tokenizer(folder)
    tokenizer.encode_special_tokens = False
    # It decides offsets only: no special tokens are added. Trimmed ones would hide a blank that
    # belongs to a turn.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return a pattern of the tokens that a tokenizer marks special."""
    special = [
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    ]
    # Without any nothing matches, and a turn has no end.
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")


def encode_spans(
    tokenizer: Tokenizer, text: str, spans: Sequence[Span]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Return a text's ids, and true for the tokens in the spans.

    No token crosses the beginning of a span: what stands before is encoded as the prompt that a
    model is given. A turn that begins with a line break would else share a token with the prompt.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    bounds = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    begins = np.array([begin for begin, _ in spans], dtype=np.int64)
    # The last token that starts before each span; offsets never go back.
    before = np.maximum(np.searchsorted(bounds[:, 0], begins) - 1, 0)
    crossed = begins[(bounds[before, 0] < begins) & (begins < bounds[before, 1])].tolist()
    ids: list[int] = []
    offsets: list[Span] = []
    for begin, end in zip([0, *crossed], [*crossed, len(text)], strict=True):
        part = tokenizer.encode(text[begin:end], add_special_tokens=False) if crossed else encoding
        ids += part.ids
        offsets += [(begin + a, begin + b) for a, b in part.offsets]
    starts = np.array([start for start, _ in offsets], dtype=np.int64)
    learnt = np.zeros(len(ids), dtype=np.bool_)
    for begin, end in spans:
        learnt |= (starts >= begin) & (starts < end)
    return np.array(ids, dtype=np.int32), learnt


def conversation_hash(conversation: Conversation) -> int:
    """Return a 64-bit hash of a conversation's content."""
    content: dict[str, Any] = {
        "messages": [message.plain() for message in conversation.messages],
        "tools": list(conversation.tools),
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "little")
