"""Documents of a corpus: Python source code installed on this machine, or files the user names.

No text stays in memory. ``select`` reads every candidate once, drops exact duplicates by content
hash, decides the split from that hash, and returns references (:class:`Document`) that a worker
process can read by itself.

The result is deterministic: the same files and the same seed give the same documents in the same
order with the same split, wherever the packages are installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mellum2_megatron.common.errors import InputError, WorkError

logger = logging.getLogger(__name__)

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")

# A free-text licence field counts as open source only if it names one of these.
_OPEN_LICENCE = re.compile(
    r"\b(apache|bsd|mit|isc|psf|python software foundation|mpl|zlib|unlicense|hpnd)\b",
    re.IGNORECASE,
)
# Python's own tests are not part of every distribution, and hold deliberately broken files.
_STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
# Longer files of an installed package are nearly always generated tables.
INSTALLED_FILE_LIMIT = 256 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A named origin of documents: an installed package, the standard library, or a user's path.

    Attributes:
        name: name in ``corpus.json``.
        key: the source's part of the sampling hash; not a path, so that moving the files does not
            change the sample.
        version: version of the package, or None.
        licence: licence as stated by the package.
        root: folder of the files, or the one file.
        files: all files, in order.
        given: true if the user named the file itself, which must then be readable text. An
            unreadable file of a folder is left out and counted instead.
        file_limit: longest file taken, in bytes; longer ones are left out and counted. Default
            None: no limit.
    """

    name: str
    key: str
    version: str | None
    licence: str
    root: Path
    files: tuple[Path, ...]
    given: bool
    file_limit: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A reference to one document: a file, or one line of a ``.jsonl`` file.

    Attributes:
        source: index of the document's source.
        path: the file.
        line: line number in a ``.jsonl`` file, from 1; 0 for a whole file.
        offset: first byte of the document in the file.
        length: bytes in the file, -1 for all.
        size: bytes of the text in UTF-8.
        digest: first 16 bytes of the text's SHA-256; decides duplicates and the split.
        split: the document's split.
    """

    source: int
    path: str
    line: int
    offset: int
    length: int
    size: int
    digest: bytes
    split: Split


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The documents of a corpus.

    Attributes:
        sources: all sources, contributing or not.
        documents: the documents, ordered by source, path and line.
        left_out: number of documents left out, by reason.
    """

    sources: tuple[Source, ...]
    documents: tuple[Document, ...]
    left_out: dict[str, int]

    def of(self, split: Split) -> list[Document]:
        """Return the documents of one split, in order."""
        return [document for document in self.documents if document.split == split]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A document not yet read; ``key`` orders candidates at random, the rest as in `Document`."""

    key: bytes
    source: int
    path: Path
    line: int
    offset: int
    length: int


def installed_sources() -> tuple[list[Source], list[str]]:
    """Return the Python files of the standard library and of openly licensed distributions.

    Returns:
        The sources sorted by name, and the names of the installed distributions that state no
        open-source licence and are left out.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    version = ".".join(map(str, sys.version_info[:3]))
    sources = [
        Source(
            name="python-standard-library",
            key="python-standard-library",
            version=version,
            licence="PSF-2.0",
            root=stdlib,
            files=tuple(
                path for path in _walk(stdlib, skip=_STDLIB_LEFT_OUT) if path.suffix == ".py"
            ),
            given=False,
            file_limit=INSTALLED_FILE_LIMIT,
        )
    ]
    refused = []
    # This project is no source: its corpus would change with each of its versions.
    seen = {"mellum2-megatron"}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.name).lower()
        if name in seen:
            continue
        seen.add(name)
        root = Path(str(distribution.locate_file("")))
        # Files outside of the packages' folder (`..`) are scripts that the installer generated.
        listed = [
            str(file)
            for file in distribution.files or ()
            if file.suffix == ".py" and file.parts[0] != ".."
        ]
        files = tuple(path for path in (root / file for file in sorted(listed)) if path.is_file())
        if not files:
            continue
        licence = open_licence(distribution.metadata)
        if licence is None:
            refused.append(name)
            continue
        sources.append(
            Source(
                name=name,
                key=name,
                version=distribution.version,
                licence=licence,
                root=root,
                files=files,
                given=False,
                file_limit=INSTALLED_FILE_LIMIT,
            )
        )
    return sorted(sources, key=lambda source: source.name), sorted(refused)


def open_licence(metadata: importlib.metadata.PackageMetadata) -> str | None:
    """Return the open-source licence in a distribution's metadata, or None without one.

    Read in the order of reliability: SPDX expression, classifiers, first line of the free text.
    """
    expression = (metadata.get("License-Expression") or "").strip()
    if expression:
        return None if "LicenseRef" in expression else expression
    prefix = "License :: OSI Approved :: "
    approved = [
        item.removeprefix(prefix)
        for item in metadata.get_all("Classifier") or ()
        if item.startswith(prefix)
    ]
    if approved:
        return " / ".join(approved)
    lines = (metadata.get("License") or "").strip().splitlines()
    return lines[0].strip() if lines and _OPEN_LICENCE.search(lines[0]) else None


def given_sources(paths: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Return a source for each file or folder that the user names.

    A text file is one document; a ``.jsonl`` file has one in each line, under the key ``text``.

    Raises:
        InputError: a path does not exist, is named twice, or is a folder without files.
    """
    sources: list[Source] = []
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise InputError(
                f"--input {given}",
                rule="there is no such file or folder",
                fix="name existing text files, .jsonl files or folders",
            )
        files = tuple(_walk(path)) if path.is_dir() else (path,)
        if not files:
            raise InputError(
                f"--input {given}",
                rule="the folder holds no files",
                fix="name a folder with text or .jsonl files",
            )
        if any(source.root.resolve() == path.resolve() for source in sources):
            raise InputError(
                f"--input {given}", rule="each input may be named once", fix="remove the repetition"
            )
        sources.append(
            Source(
                name=str(given),
                key=f"input {len(sources)}",
                version=None,
                licence="not stated (given by the user)",
                root=path,
                files=files,
                given=not path.is_dir(),
            )
        )
    return sources


def select(
    sources: Sequence[Source],
    *,
    seed: int,
    valid_fraction: float,
    max_bytes: int | None,
    advance: Callable[[int], None] = lambda _: None,
) -> Selection:
    """Read every candidate once, and choose the corpus' documents and the split of each.

    With ``max_bytes`` the candidates are visited in the order of a hash of (seed, source, relative
    path, line) until the next one would not fit. This is an even sample of all of them, the same on
    every machine with the same files.

    Args:
        sources: sources of candidates.
        seed: seed of the sample and of the split.
        valid_fraction: share of the documents in the validation split, drawn by content hash.
        max_bytes: upper limit of the corpus in bytes of UTF-8, or None.
        advance: called with the bytes of each document taken.

    Raises:
        InputError: a named file is not text, or a ``.jsonl`` line is not ``{"text": ...}``.
    """
    candidates = [
        candidate
        for index, source in enumerate(sources)
        for candidate in _candidates(index, source, seed)
    ]
    if max_bytes is not None:
        # In this order the sample of a smaller limit is part of that of a larger one.
        candidates.sort(key=lambda candidate: candidate.key)
    left_out: Counter[str] = Counter()
    seen: set[bytes] = set()
    documents: list[Document] = []
    total = 0
    for candidate in candidates:
        text, reason = _read_candidate(candidate, sources[candidate.source])
        if text is None:
            left_out[reason] += 1
            continue
        data = text.encode("utf-8")
        digest = hashlib.sha256(data).digest()[:16]
        if digest in seen:
            left_out["duplicate"] += 1
            continue
        # The sample ends here: skipping long documents instead would favour short ones.
        if max_bytes is not None and total + len(data) > max_bytes:
            break
        seen.add(digest)
        total += len(data)
        advance(len(data))
        # Uniform in [0, 1) and a function of content and seed alone: an even split that stays the
        # same when files are moved or added.
        draw = hashlib.blake2b(digest, digest_size=8, key=str(seed).encode()).digest()
        fraction = int.from_bytes(draw, "big") / 2**64
        documents.append(
            Document(
                source=candidate.source,
                path=str(candidate.path),
                line=candidate.line,
                offset=candidate.offset,
                length=candidate.length,
                size=len(data),
                digest=digest,
                split="valid" if fraction < valid_fraction else "train",
            )
        )
    # Datasets keep this order, whatever the order of reading was.
    documents.sort(key=lambda document: (document.source, document.path, document.line))
    return Selection(
        sources=tuple(sources), documents=tuple(documents), left_out=dict(sorted(left_out.items()))
    )


def read_document(document: Document) -> str:
    """Return the text of a selected document.

    Raises:
        WorkError: the file is gone, or its text is no longer the selected one.
    """
    fix = "leave the input files alone while they are prepared, and run the command again"
    try:
        text = _read_text(Path(document.path), document.line, document.offset, document.length)
    except (OSError, ValueError) as error:
        raise WorkError(f"{document.path} can no longer be read ({error})", fix=fix) from error
    if hashlib.sha256(text.encode("utf-8")).digest()[:16] != document.digest:
        raise WorkError(f"{document.path} changed while the corpus was prepared", fix=fix)
    return text


def _walk(root: Path, *, skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files under ``root``, sorted, without hidden ones and links to folders."""

    def refuse(error: OSError) -> None:
        rule = f"the folder cannot be listed ({error.strerror})"
        raise InputError(str(error.filename), rule=rule, fix="make it readable or leave it out")

    for folder, folders, names in os.walk(root, onerror=refuse):
        # In place: os.walk descends into this list's folders.
        folders[:] = sorted(
            name for name in folders if name not in skip and not name.startswith(".")
        )
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _candidates(index: int, source: Source, seed: int) -> Iterator[_Candidate]:
    """Yield the documents of a source without decoding them: files, and lines of ``.jsonl``."""
    for path in source.files:
        relative = path.relative_to(source.root).as_posix()
        label = f"{seed}\0{source.key}\0{relative}\0".encode("utf-8", "surrogateescape")
        if path.suffix != ".jsonl":
            yield _Candidate(key=_hash(label), source=index, path=path, line=0, offset=0, length=-1)
            continue
        try:
            file = path.open("rb")
        except OSError as error:
            raise _unreadable(str(path), error) from error
        with file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    key = _hash(label + str(number).encode())
                    yield _Candidate(
                        key=key,
                        source=index,
                        path=path,
                        line=number,
                        offset=offset,
                        length=len(line),
                    )
                offset += len(line)


def _read_candidate(candidate: _Candidate, source: Source) -> tuple[str | None, str]:
    """Return a candidate's text, or None and the reason to leave it out.

    Raises:
        InputError: a file that the user named, or a ``.jsonl`` line, is unreadable.
    """
    path, jsonl = candidate.path, candidate.line > 0
    name = f"{path} line {candidate.line}" if jsonl else str(path)
    must_work = source.given or jsonl
    try:
        if not jsonl and source.file_limit is not None and path.stat().st_size > source.file_limit:
            return None, "too_large"
        text = _read_text(path, candidate.line, candidate.offset, candidate.length)
    except OSError as error:
        if must_work:
            raise _unreadable(name, error) from error
        return None, "unreadable"
    except ValueError as error:  # UnicodeError and JSONDecodeError are ValueErrors
        if must_work:
            rule = "it must be text in UTF-8"
            if jsonl:
                rule = 'each line must be a JSON object with a string of valid Unicode under "text"'
            raise InputError(
                name, rule=f"{rule} ({error})", fix="convert it or leave it out"
            ) from error
        return None, "not_utf8"
    # A binary file may happen to be valid UTF-8.
    if not must_work and "\0" in text:
        return None, "binary"
    return (text, "") if text.strip() else (None, "empty")


def _unreadable(name: str, error: OSError) -> InputError:
    return InputError(
        name, rule=f"it cannot be read ({error.strerror})", fix="make it readable or leave it out"
    )


def _read_text(path: Path, line: int, offset: int, length: int) -> str:
    """Return the text at a place in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or the line no JSON object with a text.
    """
    # Bytes, not text mode: line endings are part of the document.
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    text = data.decode("utf-8")
    if not line:
        return text
    value = json.loads(text)
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError('no string under the key "text"')
    text = str(value["text"])
    text.encode("utf-8")  # refuses lone surrogates, which JSON can spell and no tokenizer holds
    return text


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
