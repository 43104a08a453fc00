"""Tally of what a corpus leaves out: a count and the first example for each reason."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

REASONS: Mapping[str, str] = {
    "not_utf8": "not UTF-8",
    "binary": "binary (with NUL bytes)",
    "empty": "empty",
    "too_large": "too large",
    "duplicate": "exact duplicates",
    "bad_row": "bad rows",
    "compressed": "compressed in a way that is not read (.jsonl.gz, .jsonl.zst and .json.gz are)",
    "table": "tables of a kind that is not read (.parquet is)",
    "no_rows": "files without rows (.jsonl and .parquet have some)",
    "lfs_pointer": "Git LFS pointers (fetch the files with `git lfs pull`)",
    "linked_folder": "linked folders",
    "not_regular": "not regular files (pipes, sockets, devices)",
    "unreadable": "unreadable (permissions, broken links)",
    "hidden": "hidden (their names begin with a dot)",
    "not_sampled": "not in the sample that fits --max-megabytes",
}
"""Reason -> its wording in a line for the user."""


def printable(path: str | os.PathLike[str]) -> str:
    r"""Return a path as text that every console and JSON file takes.

    Bytes of a file name that are not UTF-8 are spelt as ``\xe9``.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(slots=True)
class LeftOut:
    """Items left out of a corpus: documents, rows, files or folders.

    Attributes:
        counts: number of items by reason, a key of `REASONS`.
        first: first item of each reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count ``count`` items of one reason."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.first.setdefault(reason, example)

    def lines(self) -> list[str]:
        """Return a line for each reason, the largest count first.

        >>> tally = LeftOut()
        >>> tally.add("not_utf8", "in/a.py", 300)
        >>> tally.lines()
        ['left out: 300 not UTF-8 (first: in/a.py)']
        """
        reasons = sorted(self.counts, key=lambda reason: (-self.counts[reason], reason))
        return [
            f"left out: {self.counts[reason]:,} {REASONS[reason]} (first: {self.first[reason]})"
            for reason in reasons
        ]
