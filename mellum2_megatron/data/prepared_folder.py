"""Reads and checks a prepared corpus, the folder that `mellum2 data prepare` writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import check_size
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.data.corpus.selection import SPLITS, Split
from mellum2_megatron.data.phase_record import PHASE_FILE, PLAN_FILE, packed_phases
from mellum2_megatron.data.tokens.tokenizer import tokenizer_hash

CORPUS_FILE = "corpus.json"
"""Name of the record of a prepared folder."""

FORMAT = 1
"""Version of the folder's layout, in ``corpus.json``."""

_PREPARE_AGAIN = "make it again with `mellum2 data prepare --output PATH --overwrite`"


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitStatistics:
    """Size of one split.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, one eod per document included.
        bytes: bytes of the texts in UTF-8.
        bin_bytes, idx_bytes: file sizes of the indexed dataset.
        bin_sha256: SHA-256 of the ``.bin`` file, hexadecimal.
    """

    documents: int
    tokens: int
    bytes: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """A prepared folder.

    Attributes:
        path: the folder.
        vocab_size: rows that an embedding needs for the tokenizer.
        special_ids: ids of the tokenizer's special tokens, by role.
        splits: size of each split.
        valid_unigram_entropy_nats: entropy of the validation split's token distribution, in nats;
            the lowest loss of any predictor without context.
        tokenizer_sha256: SHA-256 of ``tokenizer.json``, hexadecimal.
        seed: seed of the sample and the split.
        corpus: content of ``corpus.json``.
    """

    path: Path
    vocab_size: int
    special_ids: dict[str, int]
    splits: dict[str, SplitStatistics]
    valid_unigram_entropy_nats: float
    tokenizer_sha256: str
    seed: int
    corpus: dict[str, Any]

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer in Hugging Face format."""
        return self.path / "tokenizer"

    @property
    def eod(self) -> int:
        """Id that ends every document; eos in folders of earlier versions."""
        return self.special_ids["eod" if "eod" in self.special_ids else "eos"]

    def prefix(self, split: Split) -> Path:
        """Return the path of a split's indexed dataset without ``.bin`` / ``.idx``."""
        return self.path / f"{split}_document"


def load_prepared(
    path: str | os.PathLike[str], *, name: str | None = None, check_files: bool = True
) -> PreparedData:
    """Read a prepared folder, and check that all of its files have their full length.

    Hashes of the tokens are not checked: that would read the whole corpus at every start.

    Args:
        path: the folder.
        name: the user's name for it, for messages; default ``data.path=PATH``.
        check_files: check lengths and tokenizer, default true. False: the record alone is read.

    Raises:
        InputError: the folder is missing, not a prepared folder, of another format, or truncated;
            or it holds another tokenizer.
    """
    folder, name = Path(path), name or f"data.path={path}"
    if not (folder / "corpus.json").is_file():
        _refuse_plan(folder, name)
        raise InputError(
            name,
            rule="it is not a prepared corpus (there is no corpus.json)",
            fix=f"make one with `mellum2 data prepare --output {path}`",
        )
    try:
        facts = load_json(folder / "corpus.json")
        if facts["format"] != FORMAT:
            raise InputError(
                name,
                rule=f"its format is {facts['format']}, this version reads {FORMAT}",
                fix=_PREPARE_AGAIN,
            )
        prepared = PreparedData(
            path=folder,
            vocab_size=facts["tokenizer"]["vocab_size"],
            special_ids=facts["tokenizer"]["special_ids"],
            splits={split: SplitStatistics(**facts["splits"][split]) for split in SPLITS},
            valid_unigram_entropy_nats=facts["valid_unigram_entropy_nats"],
            tokenizer_sha256=facts["tokenizer"]["sha256"],
            seed=facts["seed"],
            corpus=facts,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'corpus.json'}", rule=f"it is damaged ({error!r})", fix=_PREPARE_AGAIN
        ) from error
    if not check_files:
        return prepared
    for split in SPLITS:
        statistics = prepared.splits[split]
        for suffix, size in ((".bin", statistics.bin_bytes), (".idx", statistics.idx_bytes)):
            check_size(folder / f"{split}_document{suffix}", size, fix=_PREPARE_AGAIN)
    if (
        not (prepared.tokenizer_dir / "tokenizer.json").is_file()
        or tokenizer_hash(prepared.tokenizer_dir) != prepared.tokenizer_sha256
    ):
        raise InputError(
            str(prepared.tokenizer_dir),
            rule="it is not the tokenizer this data was encoded with",
            fix=_PREPARE_AGAIN,
        )
    return prepared


def _refuse_plan(folder: Path, name: str) -> None:
    """Refuse the folder of a corpus plan or of a phase with the keys that take it.

    Raises:
        InputError: it is such a folder.
    """
    phases = packed_phases(folder)
    if (folder / PHASE_FILE).is_file():
        raise InputError(
            name,
            rule="it is one phase of a corpus plan",
            fix=f"use data.path={folder.parent} data.phase={folder.name.removeprefix('phase-')}",
        )
    if phases:
        raise InputError(
            name,
            rule="it is a corpus plan's folder, and a run trains on one of its phases "
            f"({', '.join(map(str, phases))})",
            fix=f"use data.path={folder} data.phase={phases[0]}",
        )
    if (folder / PLAN_FILE).is_file():
        raise InputError(
            name,
            rule="it is a corpus plan's folder, and no phase is packed yet",
            fix="run the plan to its end with `mellum2 data run`, and set data.phase",
        )
