"""Chat files to a folder of packs with loss masks, for supervised fine-tuning.

Samples are packed whole: one that does not fit into a sequence is dropped and counted, never cut
(report §5.1). The folder appears at once and complete, or not at all. Its bytes depend on the
inputs, the options and the seed, not on ``workers``.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import (
    atomic_directory,
    check_new_folder,
    write_json,
    write_text,
)
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.common.stage_bars import stage_bars
from mellum2_megatron.data.chat.encoding import EncodedRow, encode_rows
from mellum2_megatron.data.chat.reading import chat_files, read_chat_rows
from mellum2_megatron.data.chat.samples import UNFOLDED, Sample, chat_tokenizer
from mellum2_megatron.data.chat.shards import ShardWriter, Split
from mellum2_megatron.data.chat.template import (
    CHAT_TEMPLATE_FILE,
    ChatTemplate,
    Mode,
    check_template,
    choose_template,
)
from mellum2_megatron.data.corpus.left_out import LeftOut, printable
from mellum2_megatron.data.tokens.document_tokenizer import end_of_document
from mellum2_megatron.data.tokens.pack_files import PACKS_FILE, PackFolder, read_pack_folder
from mellum2_megatron.data.tokens.pack_writer import write_record
from mellum2_megatron.data.tokens.tokenizer import (
    copy_tokenizer,
    special_ids,
    tokenizer_hash,
    vocab_size,
)

logger = logging.getLogger(__name__)

ALIGN = 16
"""Every sample starts at a multiple of it: 2 chunks for each of the report's 8 CP ranks."""

SHARD_TOKENS = 64 << 20
"""Tokens that are packed together in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPacks:
    """A written folder of chat packs.

    Attributes:
        folder: the folder.
        counts: counts of what is in it, and of what was left out.
        files_left_out: a line for each reason why files of a given folder were not read.
    """

    folder: PackFolder
    counts: ChatCounts
    files_left_out: tuple[str, ...]


@dataclass(kw_only=True, slots=True)
class ChatCounts:
    """Counts of a preparation.

    Attributes:
        conversations: conversations that are in the packs with one sample or more.
        samples: samples in the packs.
        tokens, learnt: their tokens, and those that are learnt.
        without_reasoning: conversations that thinking mode leaves out.
        too_long: samples that do not fit into a pack.
        bad_rows: rows that cannot be used.
        first_bad_row: place and fault of the first of them; None without any.
    """

    conversations: int = 0
    samples: int = 0
    tokens: int = 0
    learnt: int = 0
    without_reasoning: int = 0
    too_long: int = 0
    bad_rows: int = 0
    first_bad_row: str | None = None

    def left_out(self) -> list[str]:
        """Return a line for each reason for which something was left out."""
        lines = []
        if self.bad_rows:
            lines.append(f"left out: {self.bad_rows:,} bad rows (first: {self.first_bad_row})")
        if self.without_reasoning:
            lines.append(f"left out: {self.without_reasoning:,} conversations without reasoning")
        if self.too_long:
            lines.append(f"left out: {self.too_long:,} samples longer than a pack")
        return lines


def prepare_chat(
    output: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    *,
    tokenizer: str | os.PathLike[str],
    mode: Mode,
    length: int,
    chat_template: str | None = None,
    align: int = ALIGN,
    valid_fraction: float = 0.02,
    seed: int = 1234,
    skip_bad_rows: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
) -> ChatPacks:
    """Make packs of conversations.

    Args:
        output: folder to make.
        inputs: ``.jsonl`` (also ``.gz``, ``.zst``) or parquet files, or folders of them.
        tokenizer: Hugging Face tokenizer folder, or one that has it as ``tokenizer/``.
        mode: kind of training, see `SampleMaker`.
        length: tokens of a pack, a multiple of ``align``.
        chat_template: Jinja file, or ``mellum`` for ours; default None: the tokenizer's own, else
            ours.
        align: every sample starts at a multiple of it; training on cp context-parallel ranks needs
            2 cp. Default 16.
        valid_fraction: share of the conversations held out for validation, drawn by content; one
            at least. 0 for none. Default 0.02.
        seed: seed of the split and of the order in packs.
        skip_bad_rows: count rows that cannot be used instead of refusing them; default False.
        workers: processes; default None: one per core.
        overwrite: replace an earlier result, default False.
        progress: show progress bars when standard error is a terminal, default True.
        shard_tokens: tokens that are packed together; default `SHARD_TOKENS`.

    Raises:
        InputError: bad arguments, template or rows; nothing has been written.
        WorkError: the disk is full or a worker was killed; ``output`` is untouched.
    """
    target, folder = Path(output), _tokenizer_folder(Path(tokenizer))
    _check_arguments(target, length, align, valid_fraction, seed, overwrite)
    left_out = LeftOut()
    files = chat_files(inputs, target, left_out)
    eod = end_of_document(folder)
    template = choose_template(folder, chat_template)
    added = chat_tokenizer(folder).get_added_tokens_decoder().values()
    check_template(template, mode, frozenset(token.content for token in added))
    counts = ChatCounts()
    with stage_bars(progress, logger, unit="bytes") as start_stage:
        advance = start_stage("reading conversations", sum(one.file.size for one in files))
        rows = encode_rows(
            read_chat_rows(files, advance),
            tokenizer=folder,
            template=template,
            mode=mode,
            workers=workers or len(os.sched_getaffinity(0)),
        )
        try:
            with atomic_directory(target, overwrite=overwrite) as staged:
                writer = ShardWriter(
                    staged,
                    length=length,
                    align=align,
                    pad=special_ids(folder, need_eos=False).get("pad", eod),
                    vocab_size=vocab_size(folder),
                    seed=seed,
                    shard_tokens=shard_tokens,
                )
                for row in rows:
                    samples = _accept(row, counts, length, align, skip_bad_rows)
                    held_out = _draw(seed, row.conversation) < valid_fraction
                    split: Split = "valid" if held_out else "train"
                    writer.add(split, row.source, row.conversation, samples)
                if valid_fraction:
                    writer.hold_out_one()
                splits = writer.finish()
                _check_any(counts, mode, length)
                _add_tokenizer(folder, staged / "tokenizer", template)
                write_record(
                    staged,
                    splits=splits,
                    sequence_length=length,
                    sources=[printable(given) for given in inputs],
                    tokenizer_sha256=tokenizer_hash(folder),
                    vocab_size=vocab_size(folder),
                    eod=eod,
                    more={"chat": _facts(template, mode, counts, seed, valid_fraction)},
                )
        except OSError as error:
            raise WorkError(
                f"writing {target} failed ({error})",
                fix="free space on that disk or choose another --output",
            ) from error
    return ChatPacks(
        folder=read_pack_folder(target, str(target)),
        counts=counts,
        files_left_out=tuple(left_out.lines()),
    )


def _tokenizer_folder(given: Path) -> Path:
    """Return the tokenizer's folder: the given one, or the one inside a run's or a data folder."""
    inside = given / "tokenizer"
    has_own = (given / "tokenizer.json").is_file()
    return inside if not has_own and (inside / "tokenizer.json").is_file() else given


def _check_arguments(
    target: Path, length: int, align: int, valid_fraction: float, seed: int, overwrite: bool
) -> None:
    """Refuse arguments that cannot work, before the reading."""
    if align < 1 or length < 2 or length % align:
        fitting = max(align, length // align * align) if align > 0 else length
        raise InputError(
            f"--length {length} with --align {align}",
            rule="a pack has 2 tokens or more, a multiple of the alignment",
            fix=f"use --length {max(2, fitting)}, or --align {1 if length > 1 else align}",
        )
    if not 0 <= valid_fraction <= 0.5:
        raise InputError(
            f"--valid-fraction {valid_fraction}",
            rule="it must be 0 to 0.5",
            fix="use 0.02, or 0 for no validation split",
        )
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}", rule="it must be 0 to 2^63 - 1", fix="use 1234")
    check_new_folder(target, overwrite=overwrite, marker=PACKS_FILE, kind="a folder of packs")


def _accept(
    row: EncodedRow, counts: ChatCounts, length: int, align: int, skip_bad_rows: bool
) -> list[Sample]:
    """Return the samples of a row that fit into a pack, and count everything.

    Raises:
        InputError: the row cannot be used, and bad rows are not left out.
    """
    if row.fault is not None:
        if not skip_bad_rows:
            raise InputError(
                row.place,
                rule=f"it is no conversation to train on: {row.fault}",
                fix="correct the row, or leave out and count bad rows with --skip-bad-rows",
            )
        counts.bad_rows += 1
        counts.first_bad_row = counts.first_bad_row or f"{row.place}: {row.fault}"
        return []
    if not row.samples:
        counts.without_reasoning += 1
        return []
    fitting = [one for one in row.samples if -(-one.tokens.size // align) * align <= length]
    counts.conversations += bool(fitting)
    counts.too_long += len(row.samples) - len(fitting)
    counts.samples += len(fitting)
    counts.tokens += sum(one.tokens.size for one in fitting)
    counts.learnt += sum(int(one.learnt.sum()) for one in fitting)
    return fitting


def _draw(seed: int, conversation: int) -> float:
    """Return a number of 0 to 1 that seed and conversation decide."""
    digest = hashlib.sha256(f"{seed} {conversation}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def _check_any(counts: ChatCounts, mode: Mode, length: int) -> None:
    """Refuse input of which nothing is left."""
    if counts.samples:
        return
    raise InputError(
        "no sample is left",
        rule="\n".join(counts.left_out() or ["the inputs have no rows"]),
        fix=f"raise --length {length}"
        if counts.too_long
        else "use --mode instruct"
        if mode == "thinking" and counts.without_reasoning
        else "give other conversations",
    )


def _add_tokenizer(source: Path, target: Path, template: ChatTemplate) -> None:
    """Copy the tokenizer with the template that the packs were made with, and no other.

    Training copies this folder into its checkpoints, and `mellum2 release` takes it from there.
    """
    copy_tokenizer(source, target)
    write_text(target / CHAT_TEMPLATE_FILE, template.text)
    file = target / "tokenizer_config.json"
    if file.is_file():
        config = load_json(file)
        if config.pop("chat_template", None) is not None:
            write_json(file, config)


def _facts(
    template: ChatTemplate, mode: Mode, counts: ChatCounts, seed: int, valid_fraction: float
) -> dict[str, Any]:
    return {
        "mode": mode,
        "template": {"origin": template.origin, "sha256": template.sha256},
        "unfolded": UNFOLDED if mode == "thinking" else 1,
        "seed": seed,
        "valid_fraction": valid_fraction,
        "counts": asdict(counts),
    }
