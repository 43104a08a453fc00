"""Repository-level documents for long context: related files first, then the file to complete.

A document of the 128K stage holds files of one repository (report §4): the target file last, in FIM
form, and before it the files that bear on it. The report says "related files first"; nearness is
decided here: files that the target imports, then files that import it, then by the distance of
their paths. The nearest file stands next to the target. Where not all fit, the farthest are left
out; the target is never cut.

::

    <reponame>NAME
    <filename>PATH
    TEXT                        for every related file, the nearest last
    <filename>PATH
    <fim_suffix>S<fim_prefix>P<fim_middle>M
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from mellum2_megatron.common.field_checks import require
from mellum2_megatron.data.tokens.keyed_random import KeyedRandom, below

# Imports as the languages write them; one alternative a form. A regular expression finds them in
# files that do not parse, too, and what it finds is only used to order files.
_IMPORTS = {
    "python": r"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t(]+([\w, \t]*)|import[ \t]+([\w.]+))",
    "javascript": r"""(?:from|import|require\()\s*\(?['"]([^'"\n]+)['"]""",
    "java": r"^[ \t]*import[ \t]+(?:static[ \t]+)?([\w.]+)",
    "cpp": r'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]',
    "go": r'^[ \t]*(?:import[ \t]+)?(?:\w+[ \t]+)?"([\w./-]+)"',
    "rust": r"^[ \t]*(?:pub[ \t]+)?(?:use|mod)[ \t]+([\w:]+)",
}
_SAME_FORM = {"c": "cpp", "typescript": "javascript", "kotlin": "java", "scala": "java"}
_COMPILED = {name: re.compile(form, re.MULTILINE) for name, form in _IMPORTS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositorySettings:
    """Repository-level documents of one source in one phase.

    The target's orders, level of cuts and share of PSM are those of the phase's ``fim``.

    Attributes:
        rate: share of the repositories whose files are joined, default 1. The files of the others
            stay documents of their own.
        length: largest number of tokens of a document, default null: the phase's
            ``sequence_length``.

    Raises:
        InputError: a share outside 0 to 1, or a length below 64.
    """

    rate: float = 1.0
    length: int | None = None

    def __post_init__(self) -> None:
        require(
            0 < self.rate <= 1,
            f"rate={self.rate}",
            rule="it must be a share above 0, up to 1",
            fix="use 1, or leave the source out",
        )
        require(
            self.length is None or self.length >= 64,
            f"length={self.length}",
            rule="a document needs 64 tokens or more",
            fix="leave it out for the phase's sequence_length",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositoryFile:
    """A file of a repository.

    Attributes:
        path: path in the repository, with ``/``.
        text: its text.
        language: lower-case name, or None.
        tokens: tokens of the text with its line of ``<filename>``.
    """

    path: str
    text: str
    language: str | None
    tokens: int


def imported_names(file: RepositoryFile) -> list[str]:
    """Return the parts of paths that a file's imports name, ``package/module``, in order."""
    language = _SAME_FORM.get(file.language or "", file.language or "")
    form = _COMPILED.get(language)
    if form is None:
        return []
    names: list[str] = []
    depth = len(PurePosixPath(file.path).parents)
    for found in form.finditer(file.text):
        name, *rest = [group for group in found.groups() if group]
        if language == "python":
            # A relative import starts at the file's own folder, one level up for each further dot.
            dots = len(name) - len(name.lstrip("."))
            base = [str(PurePosixPath(file.path).parents[dots - 1])] if 0 < dots <= depth else []
            module = "/".join([*base, name[dots:].replace(".", "/")])
            # `from package import module` names a module or something inside one.
            words = rest[0].replace(",", " ").split() if rest else []
            names += [f"{module}/{word}" for word in words] or [module]
        elif language == "java":
            names.append(name.replace(".", "/"))
        elif language == "rust":
            names.append(re.sub(r"^(crate|self|super)::", "", name).replace("::", "/"))
        else:
            names.append(name)
    names = [str(PurePosixPath(name.removeprefix("./"))) for name in names]
    return names


def imports_among(files: Sequence[RepositoryFile]) -> list[set[int]]:
    """Return for each file the indices of the files of its repository that it imports.

    A name means the file whose path without suffix ends with it, or the folder of that name; the
    longest match of a name's beginning counts, so that ``package.module.Class`` finds the module.
    """
    ends: dict[str, set[int]] = {}
    for index, file in enumerate(files):
        if _SAME_FORM.get(file.language or "", file.language) not in _COMPILED:
            continue
        path = PurePosixPath(file.path)
        stems = [path.with_suffix(""), path]
        if path.stem in ("__init__", "index", "mod"):
            stems.append(path.parent)
        for stem in stems:
            parts = stem.parts
            for start in range(len(parts)):
                ends.setdefault("/".join(parts[start:]), set()).add(index)
    found: list[set[int]] = []
    for index, file in enumerate(files):
        imported: set[int] = set()
        for name in imported_names(file):
            parts = PurePosixPath(name).parts
            for end in range(len(parts), 0, -1):
                if matches := ends.get("/".join(parts[:end])):
                    imported |= matches
                    break
        found.append(imported - {index})
    return found


def path_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the steps from folder to folder, each given by its names from the root.

    >>> path_distance(("a", "b"), ("a", "b")), path_distance(("a", "b"), ("a", "c", "d"))
    (0, 3)
    """
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    return len(one) + len(other) - 2 * common


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """One repository-level document: indices of its files.

    Attributes:
        related: files in the order of the document, the nearest to the target last.
        target: the file in FIM form.
    """

    related: tuple[int, ...]
    target: int


def contexts(
    files: Sequence[RepositoryFile],
    *,
    capacity: int,
    target_tokens: Callable[[int], int],
    random: KeyedRandom,
    repository: int,
) -> tuple[list[Context], list[int]]:
    """Cut a repository into documents, each file in exactly one of them.

    Targets come in random order. A target takes the nearest files that are still free, as far as
    they fit. So every token is trained on once in an epoch, and other epochs give other documents.

    Args:
        files: files of the repository.
        capacity: largest number of tokens of a document's files.
        target_tokens: tokens of a file, given its index, in FIM form with its line of
            ``<filename>``. Asked for targets alone.
        random: draws of this phase and epoch.
        repository: hash of the repository's name.

    Returns:
        The documents, and the indices of files that are too long for a document of their own.
    """
    imports = imports_among(files)
    folders = [PurePosixPath(file.path).parent.parts for file in files]
    words = random.words(repository, max(len(files), 1))
    # Fisher-Yates, with a word for each swap.
    order = list(range(len(files)))
    for last in range(len(order) - 1, 0, -1):
        other = below(words[last], last + 1)
        order[last], order[other] = order[other], order[last]
    too_long = [n for n, file in enumerate(files) if file.tokens > capacity]
    free = set(range(len(files))) - set(too_long)
    made: list[Context] = []
    for target in order:
        if target not in free:
            continue
        free.remove(target)
        used = target_tokens(target)
        if used > capacity:
            too_long.append(target)
            continue
        chosen: list[int] = []
        for candidate in sorted(
            free, key=lambda other: (*_nearness(files, folders, imports, target, other), other)
        ):
            # The first that does not fit ends the list: a farther one would be kept before it.
            if used + files[candidate].tokens > capacity:
                break
            chosen.append(candidate)
            used += files[candidate].tokens
        free -= set(chosen)
        made.append(Context(related=tuple(reversed(chosen)), target=target))
    return made, sorted(too_long)


def _nearness(
    files: Sequence[RepositoryFile],
    folders: Sequence[tuple[str, ...]],
    imports: Sequence[set[int]],
    target: int,
    other: int,
) -> tuple[int, int, str]:
    """Return a key that is smaller for nearer files."""
    if other in imports[target]:
        tie = 0
    elif target in imports[other]:
        tie = 1
    else:
        tie = 2
    return tie, path_distance(folders[target], folders[other]), files[other].path
