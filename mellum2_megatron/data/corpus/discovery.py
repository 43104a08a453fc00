"""Sources of a corpus: Python source code installed on this machine, or paths the user names."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.corpus.left_out import LeftOut, printable
from mellum2_megatron.data.corpus.listing import SourceFile, list_files, named_file

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
        files: all files, in order.
    """

    name: str
    key: str
    version: str | None
    licence: str
    files: tuple[SourceFile, ...]


def standard_library(left_out: LeftOut) -> Source:
    """Return the standard library of the running Python, without its tests."""
    return Source(
        name="python-standard-library",
        key="python-standard-library",
        version=".".join(map(str, sys.version_info[:3])),
        licence="PSF-2.0",
        files=tuple(
            list_files(
                Path(sysconfig.get_paths()["stdlib"]),
                left_out,
                skip=_STDLIB_LEFT_OUT,
                keep=lambda name: name.endswith(".py"),
            )
        ),
    )


def installed_sources(left_out: LeftOut) -> tuple[list[Source], list[str]]:
    """Return the Python files of the standard library and of openly licensed distributions.

    Returns:
        The sources sorted by name, and the names of the installed distributions that state no
        open-source licence and are left out.
    """
    sources = [standard_library(left_out)]
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
        files = tuple(
            SourceFile(
                path=root / file,
                relative=Path(file).as_posix(),
                format="text",
                size=(root / file).stat().st_size,
                given=False,
            )
            for file in sorted(listed)
            if (root / file).is_file()
        )
        if not files:
            continue
        licence = open_licence(distribution.metadata)
        if licence is None:
            refused.append(name)
            continue
        sources.append(
            Source(name=name, key=name, version=distribution.version, licence=licence, files=files)
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


def given_sources(paths: Sequence[str | os.PathLike[str]], left_out: LeftOut) -> list[Source]:
    """Return a source for each file or folder that the user names.

    A text file is one document; a file of rows has one in each.

    Raises:
        InputError: a path does not exist, is named twice, is a folder without files that can be
            read, or is a file that cannot.
    """
    sources: list[Source] = []
    named: set[str] = set()
    for given in paths:
        path, name = Path(given), f"--input {printable(given)}"
        if path.is_dir():
            files = tuple(list_files(path, left_out))
            if not files:
                raise InputError(
                    name,
                    rule="the folder holds no files that can be read"
                    + "".join(f"; {line}" for line in left_out.lines()),
                    fix="name a folder with text files, .jsonl or .parquet files",
                )
        else:
            files = (named_file(path, name),)
        if os.path.realpath(path) in named:
            raise InputError(name, rule="each input may be named once", fix="remove the repetition")
        named.add(os.path.realpath(path))
        sources.append(
            Source(
                name=printable(given),
                key=f"input {len(sources)}",
                version=None,
                licence="not stated (given by the user)",
                files=files,
            )
        )
    return sources
