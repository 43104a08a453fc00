"""The content of a run's data, recorded in each checkpoint, so that a resume notices a change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mellum2_megatron.checkpoint.resume_keys import Change
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.common.values import to_plain

if TYPE_CHECKING:
    from mellum2_megatron.data.feed.sources import RunData

DATA_FILE = "data.json"
"""File in a checkpoint's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRecord:
    """Hashes of the data that a run reads.

    Attributes:
        train, valid: hash of the tokens of each source, or where there is none their size.
        tokenizer: SHA-256 of the tokenizer; empty if no source has one recorded.
    """

    train: tuple[str, ...]
    valid: tuple[str, ...]
    tokenizer: str

    @classmethod
    def of(cls, data: RunData) -> DataRecord:
        """Return the record of checked data."""
        hashes = {source.tokenizer_sha256 for source in (*data.train, *data.valid)} - {None}
        return cls(
            train=tuple(source.identity for source in data.train),
            valid=tuple(source.identity for source in data.valid),
            # `check_data` refuses sources of several tokenizers.
            tokenizer=next(iter(hashes), None) or "",
        )

    @classmethod
    def read(cls, folder: Path) -> DataRecord | None:
        """Return the record in a checkpoint's folder; None for an older checkpoint or an import."""
        try:
            value = load_json(folder / DATA_FILE)
            return cls(
                train=tuple(value["train"]),
                valid=tuple(value["valid"]),
                tokenizer=value["tokenizer"],
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Write the record into a checkpoint's folder."""
        write_json(folder / DATA_FILE, to_plain(self))

    def changes(self, now: DataRecord) -> tuple[Change, ...]:
        """Return the changes of content from this record to ``now``."""
        found = []
        if self.tokenizer and now.tokenizer and self.tokenizer != now.tokenizer:
            found.append(
                Change(
                    key="content of data.tokenizer",
                    before=self.tokenizer[:12],
                    after=now.tokenizer[:12],
                    kind="fixed",
                    reason="the ids that the model has learnt mean other texts",
                )
            )
        for split, old, new in (
            ("train", self.train, now.train),
            ("valid", self.valid, now.valid),
        ):
            if old != new:
                found.append(
                    Change(
                        key=f"content of the data, {split}",
                        before=" ".join(name[:12] for name in old),
                        after=" ".join(name[:12] for name in new),
                        kind="recorded",
                        reason="the samples are others",
                    )
                )
        return tuple(found)
