"""The data of a run, found and checked before anything starts: sources, tokenizer, amounts.

A source is a folder of `mellum2 data prepare`, or the prefix of a Megatron indexed dataset. Imports
neither torch nor Megatron, so rules, launchers and every rank check the same.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.data.corpus.selection import Split
from mellum2_megatron.data.feed.entries import entries, is_folder, is_packs, tokenizer_folder
from mellum2_megatron.data.feed.order import BlendSchedule
from mellum2_megatron.data.feed.task_files import task_file
from mellum2_megatron.data.phase_record import read_phase
from mellum2_megatron.data.prepared_folder import CORPUS_FILE, load_prepared
from mellum2_megatron.data.tokens.document_tokenizer import end_of_document
from mellum2_megatron.data.tokens.indexed_files import read_indexed
from mellum2_megatron.data.tokens.pack_files import PackShard, ShardEntry, read_pack_folder
from mellum2_megatron.data.tokens.token_bytes import token_bytes
from mellum2_megatron.data.tokens.tokenizer import special_ids, tokenizer_hash, vocab_size

if TYPE_CHECKING:
    from mellum2_megatron.config import Data, Run

_FIX = "prepare the data with a fitting tokenizer, or train an architecture that fits this one"

# Megatron counts the epochs one by one and holds two numbers for each document of each of them
# (megatron/core/datasets/gpt_dataset.py:676, 721, 0.19.2).
_REPEATED_SEQUENCES = 1_000_000_000
"""Sequences of a set of documents that is read more than 1,000 times."""
_OPENED_SHARDS = 16
"""Shards of a set of packs that are opened before a start; the sizes of all are checked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One set of training or validation tokens.

    Attributes:
        key: key of the run that names it, ``data.path``, ``data.train`` or ``data.valid``.
        name: short name for logs, unique among the sources of its split.
        weight: share of the samples, relative to the other sources of its split.
        prefix: path of the indexed dataset, without ``.bin`` or ``.idx``; of packs, of the first
            shard.
        tokens: number of tokens.
        documents: number of documents; of packs 0.
        identity: hash of the tokens, or where there is none their size.
        tokenizer_sha256: hash of the tokenizer they were made with; None if it is not recorded.
        vocab_size: entries of that tokenizer; None if it is not recorded.
        eod: id that ends its documents; None if it is not recorded.
        shards: shards of packs; empty for documents.
        chat_mode: mode of `mellum2 data chat` that made the packs; None (default): others did.
    """

    key: str
    name: str
    weight: float
    prefix: Path
    tokens: int
    documents: int = 0
    identity: str
    tokenizer_sha256: str | None
    vocab_size: int | None
    eod: int | None = None
    shards: tuple[ShardEntry, ...] = ()
    chat_mode: str | None = None

    @property
    def cache(self) -> Path:
        """Folder of Megatron's sample indices, unless ``data.cache`` names another."""
        return self.prefix.parent / "cache"

    def sequences(self, length: int) -> int:
        """Return the number of sequences in one epoch, 1 or more."""
        if self.shards:
            return sum(shard.packs for shard in self.shards)
        # Each sequence needs one token beyond its end: its last label.
        return max(1, (self.tokens - 1) // length)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetTokenizer:
    """The attributes of a tokenizer that Megatron's datasets read; training encodes no text.

    Attributes:
        vocab_size: number of entries.
        eod: id that ends each document.
        eos: id of the end-of-sequence token; ``eod`` for a tokenizer without one.
        bos: id of the beginning-of-sequence token, or None.
        pad: -1, no token's id. Only a short last sample is padded, and its padding must not look
            like a real token: ``GPTDataset`` masks ``labels == pad`` and embeds such positions as
            token 0 (megatron/core/datasets/gpt_dataset.py:274-279, 0.19.2).
        unique_identifiers: part of the name of Megatron's index cache, so that new data never meets
            old indices.
    """

    vocab_size: int
    eod: int
    eos: int
    bos: int | None
    pad: int = -1
    unique_identifiers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """The checked data of a run.

    Attributes:
        train, valid: sources of each split, in the order of the run.
        tokenizer: tokenizer of all of them.
        notes: facts that the user should see, one a line.
        document_attention: the run's setting, decided.
    """

    train: tuple[Source, ...]
    valid: tuple[Source, ...]
    tokenizer: DatasetTokenizer
    notes: tuple[str, ...]
    document_attention: bool


def check_data(run: Run) -> RunData:
    """Check a run's data: files, sizes, tokenizers, ids and architecture.

    Raises:
        InputError: a source is missing, damaged or empty, was made with another tokenizer than the
            run's, holds ids outside its vocabulary, or does not fit ``run.architecture``.
    """
    folder = tokenizer_folder(run.data)
    # Before the tokenizer, which usually lies in the folder of a source.
    if run.data.feed == "rollouts":
        return _tasks(run, folder)
    train, valid = (_sources(run.data, split) for split in ("train", "valid"))
    ends = {source.eod: source for source in (*train, *valid) if source.eod is not None}
    tokenizer = _tokenizer(run, folder, next(iter(ends), None))
    sha256, notes = tokenizer_hash(folder), []
    for source in {source.prefix: source for source in (*train, *valid)}.values():
        if source.tokenizer_sha256 is None:
            notes.append(
                f"{source.prefix}: there is no {CORPUS_FILE} beside it, so its tokenizer cannot be "
                "compared with the run's"
            )
        elif source.tokenizer_sha256 != sha256:
            raise InputError(
                f"{source.key}: {source.prefix.parent}",
                rule=f"its tokens were made with another tokenizer ({source.vocab_size} entries, "
                f"sha256 {source.tokenizer_sha256[:12]}) than the run's, {folder} "
                f"({tokenizer.vocab_size} entries, sha256 {sha256[:12]})",
                fix=f"prepare it again with `mellum2 data prepare --tokenizer {folder}`",
            )
        if not source.shards:  # the writer of packs has checked theirs
            _check_ids(source, tokenizer.vocab_size)
    if len(ends) > 1:
        listed = ", ".join(f"{end} in {source.prefix.parent}" for end, source in ends.items())
        raise InputError(
            "data",
            rule=f"the documents of one run end with one token, and these end with {listed}",
            fix="prepare them with the same --eod",
        )
    data = RunData(
        train=train,
        valid=valid,
        tokenizer=tokenizer,
        notes=tuple(notes),
        document_attention=_document_attention(run.data, (*train, *valid)),
    )
    _check_chats(run, data)
    return data


def check_amounts(run: Run, data: RunData) -> list[str]:
    """Return how often each source is read, one line a split.

    Raises:
        InputError: a validation has fewer samples than there are validation sources, or there are
            none of those; the layout does not fit the documents in the packs; or bytes are to be
            counted and the tokenizer's tokens have none.
    """
    length = run.data.sequence_length
    if run.data.feed == "rollouts":
        return []
    notes = []
    if data.document_attention:
        _check_layout(run, data)
    samples = run.schedule.train_samples - run.data.first_sample
    if run.data.phase is not None and not run.data.train:
        record = read_phase(run.data.path, run.data.phase)
        # A run ends after a whole step; packs have the plan's margin.
        if samples >= record.samples + run.schedule.final_batch_size:
            raise InputError(
                f"data.phase={run.data.phase} of {run.data.path}",
                rule=f"it holds {record.samples:,} sequences, and the run trains on {samples:,}",
                fix=f"set schedule.train_samples={run.data.first_sample + record.samples}, or "
                "raise the phase's tokens in the plan",
            )
    shares = training_shares(data.train, samples)
    parts = _epochs(data.train, shares, length, "schedule.train_samples")
    notes.append(f"training data: {', '.join(parts)}")
    validation = run.logging.eval_iterations * run.eval_batch_size
    if validation and not data.valid:
        raise InputError(
            "validation data",
            rule="there are none: the packs have no validation split",
            fix="set data.valid, or logging.eval_iterations=0",
        )
    if validation:
        shares = validation_shares(data.valid, validation)
        keys = "logging.eval_batch_size or logging.eval_iterations"
        parts = _epochs(data.valid, shares, length, keys)
        if run.logging.validation_documents:
            token_bytes(tokenizer_folder(run.data))
        notes.append(f"validation data: {', '.join(parts)}")
    return notes


def training_shares(sources: Sequence[Source], samples: int) -> list[int]:
    """Return the training samples of each source, about; `BlendSchedule.counts` is exact."""
    return BlendSchedule([source.weight for source in sources], 0).shares(samples)


def validation_shares(sources: Sequence[Source], samples: int) -> list[int]:
    """Return the samples of each source in one validation: by weight, but one or more.

    Raises:
        InputError: there are fewer samples than sources.
    """
    if samples < len(sources):
        raise InputError(
            f"logging.eval_iterations: {samples} samples in a validation",
            rule=f"there are {len(sources)} validation sets, and each needs one",
            fix="raise logging.eval_iterations or logging.eval_batch_size",
        )
    weights = [source.weight for source in sources]
    rest = BlendSchedule(weights, 0).shares(samples - len(sources))
    return [1 + count for count in rest]


def _epochs(
    sources: Sequence[Source], shares: Sequence[int], length: int, length_keys: str
) -> list[str]:
    parts = []
    for source, share in zip(sources, shares, strict=True):
        epochs = share / source.sequences(length)
        if not source.shards and epochs > 1000 and share > _REPEATED_SEQUENCES:
            raise InputError(
                f"{source.key}: {source.name} would be read {epochs:,.0f} times",
                rule=f"{share:,} sequences of it do not fit into Megatron's index: at most "
                f"{_REPEATED_SEQUENCES:,} of a set that is read more than 1,000 times",
                fix=f"give more data, or lower {length_keys}",
            )
        parts.append(f"{source.name} {share:,} of {sum(shares):,} sequences ({epochs:.2f} epochs)")
    return parts


def _tasks(run: Run, folder: Path) -> RunData:
    """Return the data of a run that learns from its own answers: files of tasks."""
    found: dict[Split, tuple[Source, ...]] = {"train": (), "valid": ()}
    tokenizer = _tokenizer(run, folder, None)
    sha256 = tokenizer_hash(folder)
    for split in found:
        file = task_file(run.data, split)
        if file is not None:
            found[split] = (
                Source(
                    key="data.path",
                    name=file.name,
                    weight=1.0,
                    prefix=file,
                    tokens=0,
                    identity=hashlib.sha256(file.read_bytes()).hexdigest(),
                    tokenizer_sha256=sha256,
                    vocab_size=vocab_size(folder),
                ),
            )
    if not found["train"]:
        raise InputError(
            f"data.path={run.data.path}",
            rule="there is no train.jsonl with tasks in it (also .gz, .zst)",
            fix="write the tasks to one, a JSON object a line (docs/rlvr.md)",
        )
    return RunData(
        train=found["train"],
        valid=found["valid"],
        tokenizer=tokenizer,
        notes=(),
        document_attention=False,
    )


def _sources(data: Data, split: Split) -> tuple[Source, ...]:
    """Return a split's sources, each checked by itself."""
    sources, names = [], Counter[str]()
    if data.phase is not None and not (data.train if split == "train" else data.valid):
        # The message of a missing phase.
        read_phase(data.path, data.phase)
    for key, weight, entry in entries(data, split):
        path = Path(entry)
        if is_packs(entry):
            source = _packs(path, split, data, key=key, weight=weight, names=names)
            sources += [] if source is None else [source]
            continue
        whole = is_folder(key, entry)
        prefix = path / f"{split}_document" if whole else path
        label = f"data.path={entry}" if key == "data.path" else f"{key}: {entry}"
        if key == "data.path" and (entry.startswith("[") or Path(f"{entry}.bin").is_file()):
            given = entry if entry.startswith("[") else f"[[1, {entry}]]"
            raise InputError(
                label, rule="it names one prepared folder", fix=f"use data.train='{given}'"
            )
        facts: dict[str, Any] = {}
        if whole:
            facts = load_prepared(path, name=label).corpus
        elif (prefix.parent / CORPUS_FILE).is_file():
            facts = _corpus_facts(prefix.parent)
        files = read_indexed(prefix, label)
        short = prefix.parent.resolve().name if prefix.stem.endswith("_document") else prefix.name
        names[short] += 1
        made_with = facts.get("tokenizer", {})
        roles = made_with.get("special_ids", {})  # earlier versions: documents ended with eos
        hashes = facts.get("splits", {}).get(split, {}) if whole else {}
        sources.append(
            Source(
                key=key,
                name=short if names[short] == 1 else f"{short}_{names[short]}",
                weight=weight,
                prefix=prefix,
                tokens=files.tokens,
                documents=files.sequences,
                # A foreign dataset has no stored hash, and hashing it would take minutes.
                identity=hashes.get("bin_sha256", f"{files.tokens} tokens"),
                tokenizer_sha256=made_with.get("sha256"),
                vocab_size=made_with.get("vocab_size"),
                eod=roles.get("eod", roles.get("eos")),
            )
        )
    return tuple(sources)


def _packs(
    path: Path, split: Split, data: Data, *, key: str, weight: float, names: Counter[str]
) -> Source | None:
    """Return the packs of a folder as a source; None if it has none of this split."""
    label = f"{key}: {path}"
    folder = read_pack_folder(path, label)
    if folder.sequence_length != data.sequence_length:
        raise InputError(
            label,
            rule=f"its packs have {folder.sequence_length} tokens, data.sequence_length is "
            f"{data.sequence_length}",
            fix=f"set data.sequence_length={folder.sequence_length}, or pack the data again",
        )
    if not folder.packs(split):
        return None
    shards = folder.shards[split]
    # Every rank comes here; of many shards it opens some.
    for shard in shards[:: -(-len(shards) // _OPENED_SHARDS)]:
        PackShard(shard.prefix, label)
    name = path.resolve().name
    names[name] += 1
    return Source(
        key=key,
        name=name if names[name] == 1 else f"{name}_{names[name]}",
        weight=weight,
        prefix=shards[0].prefix,
        tokens=folder.packs(split) * folder.sequence_length,
        identity=folder.identity(split),
        tokenizer_sha256=folder.tokenizer["sha256"],
        vocab_size=folder.tokenizer["vocab_size"],
        eod=folder.tokenizer["eod"],
        shards=shards,
        chat_mode=folder.facts.get("chat", {}).get("mode"),
    )


def _check_chats(run: Run, data: RunData) -> None:
    """Refuse packs of conversations that the run would learn in another way than they are made for.

    Raises:
        InputError: they are of the other mode than the recipe, which has it in its name; or
            conversations would see each other.
    """
    for source in (*data.train, *data.valid):
        if source.chat_mode is None:
            continue
        for mode in {"instruct", "thinking"} - {source.chat_mode}:
            if re.search(rf"(^|_)sft_{mode}(_|$)", run.name):
                raise InputError(
                    f"{source.key}: {source.prefix.parent}",
                    rule=f"its packs were made with --mode {source.chat_mode}, and {run.name} "
                    f"trains on {mode} ones",
                    fix=f"make packs with `mellum2 data chat --mode {mode}`, or train "
                    f"{run.name.replace(f'sft_{mode}', f'sft_{source.chat_mode}')}",
                )
        if not data.document_attention:
            # The loss is per learnt token, and Megatron's router losses are per token: without the
            # documents the router cannot know how many are learnt, and its losses grow by all
            # others (`model.router`).
            raise InputError(
                f"data.document_attention=false with {source.key}: {source.prefix.parent}",
                rule="each conversation is seen by itself; as one text they would read each other, "
                "and the router's losses would count tokens that are not learnt",
                fix="leave data.document_attention out",
            )


def _document_attention(data: Data, sources: Sequence[Source]) -> bool:
    """Decide ``data.document_attention``, which is one for all sources."""
    without = [source for source in sources if not source.shards]
    if data.document_attention and without:
        raise InputError(
            "data.document_attention=true",
            rule=f"{without[0].prefix} does not record where its documents end; packs do",
            fix="pack the data, or set data.document_attention=false",
        )
    if data.document_attention is None and 0 < len(without) < len(sources):
        raise InputError(
            f"packs together with {without[0].key}: {without[0].prefix}",
            rule="in packs tokens attend within their document, in other sets they cannot",
            fix="set data.document_attention=false, or pack the other sets too",
        )
    return not without if data.document_attention is None else data.document_attention


def _check_layout(run: Run, data: RunData) -> None:
    """Refuse layouts that cannot divide packed documents."""
    chunks = 2 * run.layout.cp
    for source in (*data.train, *data.valid):
        align = math.gcd(*(shard.align for shard in source.shards))
        if run.layout.cp > 1 and align % chunks:
            raise InputError(
                f"layout.cp={run.layout.cp} with {source.key}: {source.prefix.parent}",
                rule=f"context parallelism cuts each document into {chunks} equal chunks, and the "
                f"packs are aligned to {align}",
                fix=f"pack the data with align={chunks}, or set layout.cp=1 or "
                "data.document_attention=false",
            )
    if run.layout.pp > 1 and run.schedule.micro_batch_size > 1:
        raise InputError(
            f"schedule.micro_batch_size={run.schedule.micro_batch_size} with layout.pp="
            f"{run.layout.pp}",
            rule="packed documents of a micro-batch form one stream, and pipeline stages expect "
            "single sequences",
            fix="set schedule.micro_batch_size=1 or data.document_attention=false",
        )


def _corpus_facts(folder: Path) -> dict[str, Any]:
    file = folder / CORPUS_FILE
    try:
        facts = load_json(file)
        if not isinstance(facts.get("tokenizer", {}), dict):
            raise ValueError("tokenizer is no object")
    except (OSError, ValueError) as error:
        raise InputError(
            str(file), rule=f"it is damaged ({error})", fix="prepare the folder again"
        ) from error
    return facts


def _tokenizer(run: Run, folder: Path, eod: int | None) -> DatasetTokenizer:
    """Return the run's tokenizer, checked against the architecture."""
    identifiers = special_ids(folder, need_eos=False)
    eod = end_of_document(folder) if eod is None else eod
    tokenizer = DatasetTokenizer(
        vocab_size=vocab_size(folder),
        eod=eod,
        eos=identifiers.get("eos", eod),
        bos=identifiers.get("bos"),
        unique_identifiers={"tokenizer": tokenizer_hash(folder)},
    )
    value, architecture = f"tokenizer {folder}", run.architecture
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            value,
            rule=f"it has {tokenizer.vocab_size} entries, "
            f"architecture.vocab_size is {architecture.vocab_size}",
            fix=_FIX,
        )
    for role, actual, wanted in (
        ("bos", tokenizer.bos, architecture.bos_token_id),
        ("eos", tokenizer.eos, architecture.eos_token_id),
    ):
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if actual is not None and wanted is not None and actual not in allowed:
            rule = f"its {role} id is {actual}, architecture.{role}_token_id is {wanted}"
            raise InputError(value, rule=rule, fix=_FIX)
    return tokenizer


def _check_ids(source: Source, vocabulary: int) -> None:
    """Refuse ids outside the vocabulary; they would be read beyond the embedding's end."""
    label = f"{source.key}: {source.prefix}"
    lowest, highest = read_indexed(source.prefix, label).id_range()
    if lowest < 0 or highest >= vocabulary:
        raise InputError(
            label,
            rule=f"it holds the id {lowest if lowest < 0 else highest}, the tokenizer has "
            f"{vocabulary} entries",
            fix=_FIX,
        )
