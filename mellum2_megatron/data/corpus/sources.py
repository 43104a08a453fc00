"""Documents of a file, as a stream: ``read_documents(file, options, left_out)``.

A text file is one document. JSON Lines and parquet files have one a row, under a key that the user
gives or that is one of the usual names. :mod:`listing` says which files a folder holds.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.corpus.languages import language_of_name, language_of_path
from mellum2_megatron.data.corpus.left_out import LeftOut, printable
from mellum2_megatron.data.corpus.listing import SourceFile, unreadable
from mellum2_megatron.data.corpus.rows import BadRow, Row, place, read_rows

TEXT_KEYS = ("text", "content", "code", "raw_content", "source_code", "body")
"""Keys that hold a document's text; the first one that a file has is taken."""

# In the spelling of The Stack, StarCoder's data, Dolma and CodeParrot; the first that is there.
_LANGUAGE_KEYS = ("language", "lang", "programming_language", "ext", "extension")
_REPOSITORY_KEYS = (
    "repository",
    "repo_name",
    "repository_name",
    "repo",
    "max_stars_repo_name",
    "max_forks_repo_name",
)
_PATH_KEYS = ("path", "file_path", "filepath", "max_stars_repo_path", "filename", "file_name")
_NESTED_KEYS = ("metadata", "meta")
_META_KEYS = (*_LANGUAGE_KEYS, *_REPOSITORY_KEYS, *_PATH_KEYS, *_NESTED_KEYS)
_HEAD_BYTES = 1 << 16

LARGEST_DOCUMENT = 2**31 - 1
"""Bytes of the longest document that is read at all; a longer one is left out and counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """The user's wishes for reading.

    Attributes:
        text_key: key of the text in rows; default None: the first of `TEXT_KEYS` that a file has.
        skip_bad_rows: count rows that cannot be used instead of refusing them; default False.
        max_document_bytes: longer documents are left out and counted; default None: those above
            `LARGEST_DOCUMENT`.
    """

    text_key: str | None = None
    skip_bad_rows: bool = False
    max_document_bytes: int | None = None

    @property
    def limit(self) -> int:
        """Bytes of the longest document that is read."""
        return min(self.max_document_bytes or LARGEST_DOCUMENT, LARGEST_DOCUMENT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text and its origin.

    Attributes:
        text: the text; it can be encoded in UTF-8.
        language: language in lower case (``python``, ``cpp``, ``en``), from a column or from the
            path; None if unknown.
        repository: repository, from a column.
        path: path inside the repository or folder.
        file: file the document was read from.
        row: line or row number from 1; 0 for a whole file.
    """

    text: str
    language: str | None
    repository: str | None
    path: str | None
    file: str
    row: int


def read_documents(file: SourceFile, options: ReadOptions, left_out: LeftOut) -> Iterator[Document]:
    """Yield the documents of a file in order, in constant memory.

    A pure function of the file and the options: a second pass yields the same.

    Args:
        file: the file, from `listing`.
        options: key, bad rows, limit.
        left_out: tally to add to.

    Raises:
        InputError: the file is damaged, a row has no text and ``skip_bad_rows`` is false, or a file
            that the user named is not text.
    """
    if file.format == "text":
        document = _text_document(file, options, left_out)
        if document is not None:
            yield document
        return
    limit = options.limit
    for number, row, text in _texts(file, options):
        if isinstance(text, BadRow):
            where = place(file, number)
            if text.too_large:
                left_out.add("too_large", where)
            elif options.skip_bad_rows:
                left_out.add("bad_row", f"{where}, {text.why}")
            else:
                raise _refusal(where, text)
        elif not text.strip():
            left_out.add("empty", place(file, number))
        elif len(text) > limit or len(text.encode("utf-8")) > limit:
            left_out.add("too_large", place(file, number))
        else:
            assert not isinstance(row, BadRow)
            yield _document_of(file, number, text, row)


def check_first_row(file: SourceFile, options: ReadOptions) -> None:
    """Refuse a file of rows that cannot be opened, or whose first row has no text.

    Hours before a worker comes to it: nothing else of the file is read.

    Raises:
        InputError: see `read_documents`.
    """
    if file.format == "text":
        return
    for number, _, text in _texts(file, options):
        if isinstance(text, BadRow) and not text.too_large and not options.skip_bad_rows:
            raise _refusal(place(file, number), text)
        return


def _texts(file: SourceFile, options: ReadOptions) -> Iterator[tuple[int, Row, str | BadRow]]:
    """Yield the rows of a file: number, row (empty if unreadable), and its text or its fault."""
    key = options.text_key
    # JSON spells some characters in six bytes, and a row has more than the text.
    rows = read_rows(
        file,
        columns=lambda names: _wanted_columns(names, options),
        max_row_bytes=min(6 * options.limit, LARGEST_DOCUMENT) + (1 << 20),
    )
    for number, row in rows:
        if isinstance(row, BadRow):
            yield number, {}, row
            continue
        if key is None:
            key = next((name for name in TEXT_KEYS if name in row), None)
        yield number, row, _text_of(row, key)


def _refusal(where: str, text: BadRow) -> InputError:
    return InputError(
        where,
        rule=f"each row must have a text: {text.why}",
        fix="correct the row; or name the key with --text-key, or leave out bad rows with "
        "--skip-bad-rows; in a plan these are `text_key: KEY` and `skip_bad_rows: true` of the "
        "source",
    )


def _text_of(row: Row, key: str | None) -> str | BadRow:
    """Return a row's text, or what is wrong with it."""
    if key is None or key not in row:
        wanted = repr(key) if key else "any of " + ", ".join(map(repr, TEXT_KEYS))
        keys = ", ".join(repr(name) for name in list(row)[:20]) or "none"
        return BadRow(f"no key {wanted}; its keys are {keys}")
    text = row[key]
    if isinstance(text, bytes):  # a binary column of a parquet file
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            return BadRow(f"{key!r} is not UTF-8 (byte 0x{text[error.start]:02x})")
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__.replace("float", "number")
        return BadRow(f"{key!r} is not a string but {kind}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character.
        half = ord(text[error.start])
        return BadRow(f"{key!r} has the lone surrogate \\u{half:04x} at {error.start}")
    return text


def _wanted_columns(names: Sequence[str], options: ReadOptions) -> Sequence[str]:
    """Return the columns to read of a parquet file, the text's first.

    Without a column for the text all rows are bad: one column is enough to count them, and all
    together tell what the file has.
    """
    keys = TEXT_KEYS if options.text_key is None else (options.text_key,)
    key = next((name for name in keys if name in names), None)
    if key is None:
        return names[:1] if options.skip_bad_rows else names
    return [key, *(name for name in names if name in _META_KEYS and name != key)]


def _document_of(file: SourceFile, number: int, text: str, row: Row) -> Document:
    nested: Row = next((row[name] for name in _NESTED_KEYS if isinstance(row.get(name), dict)), {})
    path = _first_string(_PATH_KEYS, row, nested)
    language = _first_string(_LANGUAGE_KEYS, row, nested)
    return Document(
        text=text,
        language=language_of_name(language) if language else language_of_path(path or ""),
        repository=_first_string(_REPOSITORY_KEYS, row, nested),
        path=path,
        file=printable(file.path),
        row=number,
    )


def _first_string(keys: Sequence[str], *rows: Mapping[str, Any]) -> str | None:
    """Return the first value that is a text and not empty, under one of the keys."""
    for row in rows:
        for key in keys:
            value = row.get(key)
            if isinstance(value, str) and value:
                # A file name may hold bytes that are no text, spelt as lone surrogates.
                return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return None


def _text_document(file: SourceFile, options: ReadOptions, left_out: LeftOut) -> Document | None:
    """Return a text file as a document; None after counting why it is left out.

    Raises:
        InputError: the user named the file, and it cannot be read or is not UTF-8.
    """
    name = printable(file.path)
    if file.size > options.limit:
        left_out.add("too_large", name)
        return None
    try:
        with file.path.open("rb") as stream:
            # The beginning tells most binaries, which may be larger than memory.
            head = stream.read(_HEAD_BYTES)
            codecs.getincrementaldecoder("utf-8")().decode(head)
            reason = _unfit(head) if not file.given else None
            data = head if reason else head + stream.read()
        text = data.decode("utf-8")
    except OSError as error:
        if file.given:
            raise unreadable(name, error) from error
        left_out.add("unreadable", name)
        return None
    except UnicodeDecodeError as error:
        if file.given:
            raise InputError(
                name,
                rule=f"it must be text in UTF-8 ({error})",
                fix="convert it (iconv -f LATIN1 -t UTF-8, say) or leave it out",
            ) from error
        # A binary with bytes that are not UTF-8 is counted by its NUL bytes.
        left_out.add("binary" if b"\0" in error.object else "not_utf8", name)
        return None
    # A binary file may happen to be valid UTF-8.
    reason = reason or (None if text.strip() else "empty")
    if not file.given and reason is None and "\0" in text:
        reason = "binary"
    if reason:
        left_out.add(reason, name)
        return None
    path = printable(file.relative)
    return Document(
        text=text,
        language=language_of_path(path),
        repository=None,
        path=path,
        file=name,
        row=0,
    )


def _unfit(head: bytes) -> str | None:
    """Return why a file of a folder is left out by its first bytes, or None."""
    if b"\0" in head:
        return "binary"
    return "lfs_pointer" if head.startswith(b"version https://git-lfs") else None
