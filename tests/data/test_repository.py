"""Repository-level documents: every file once, nearest beside the target, farthest left out."""

from collections import Counter

import pytest

from mellum2_megatron.data.tokens.keyed_random import KeyedRandom
from mellum2_megatron.data.tokens.repository import (
    Context,
    RepositoryFile,
    contexts,
    imported_names,
    imports_among,
    path_distance,
)

FIM_TOKENS = 4
RANDOM = KeyedRandom(7, "repository", 1, 0)


def file(path: str, text: str = "", language: str = "python", tokens: int = 10) -> RepositoryFile:
    return RepositoryFile(path=path, text=text, language=language, tokens=tokens)


@pytest.mark.parametrize(
    ("language", "path", "text", "names"),
    [
        ("python", "a/b/c.py", "import os, sys\n  from a.b import d, e\n",
         ["os", "a/b/d", "a/b/e"]),
        ("python", "a/b/c.py", "from . import d\nfrom .d import e\nfrom ..f import g\n",
         ["a/b/d", "a/b/d/e", "a/f/g"]),
        ("javascript", "x.js", "import a from './lib/a';\nconst b = require(\"b\");\nimport 'c'\n",
         ["lib/a", "b", "c"]),
        ("java", "X.java", "package p;\nimport static p.q.Util.run;\nimport p.Thing;\n",
         ["p/q/Util/run", "p/Thing"]),
        ("c", "x.c", "#include <stdio.h>\n# include \"lib/x.h\"\n", ["stdio.h", "lib/x.h"]),
        ("go", "x.go", "import (\n\t\"fmt\"\n\tu \"example.org/p/util\"\n)\n",
         ["fmt", "example.org/p/util"]),
        ("rust", "src/x.rs", "mod parse;\nuse crate::parse::lexer;\n", ["parse", "parse/lexer"]),
        ("markdown", "x.md", "import a\n", []),
    ],
)  # fmt: skip
def test_imports_of_each_language(language: str, path: str, text: str, names: list[str]) -> None:
    assert imported_names(file(path, text, language)) == names


def test_imports_find_files_of_the_repository() -> None:
    files = [
        file("src/app/main.py", "from app.models import User\nimport app.util.text\nimport os\n"),
        file("src/app/models/__init__.py", "from .user import User\n"),
        file("src/app/models/user.py", "from ..util import text\n"),
        file("src/app/util/text.py"),
        file("docs/os.md", language="markdown"),
    ]
    assert imports_among(files) == [{1, 3}, {2}, {3}, set(), set()]


def test_path_distance() -> None:
    one, other = ("a", "b"), ("a", "c", "d")
    assert path_distance((), ()) == 0
    assert path_distance(("a",), ()) == 1
    assert path_distance(one, other) == path_distance(other, one) == 3


def cut(
    files: list[RepositoryFile], capacity: int, random: KeyedRandom = RANDOM
) -> tuple[list[Context], list[int]]:
    return contexts(
        files,
        capacity=capacity,
        target_tokens=lambda index: files[index].tokens + FIM_TOKENS,
        random=random,
        repository=5,
    )


def make(files: list[RepositoryFile], capacity: int, random: KeyedRandom = RANDOM) -> list[Context]:
    made, too_long = cut(files, capacity, random)
    assert not too_long
    return made


def test_every_file_once_and_within_capacity() -> None:
    files = [file(f"d{n % 4}/f{n}.py", tokens=5 + n % 7) for n in range(40)]
    made = make(files, 60)
    used = Counter(index for one in made for index in (*one.related, one.target))
    assert used == dict.fromkeys(range(40), 1)
    for one in made:
        tokens = sum(files[n].tokens for n in (*one.related, one.target)) + FIM_TOKENS
        assert tokens <= 60
    assert make(files, 60) == made
    assert make(files, 60, KeyedRandom(7, "repository", 1, 1)) != made


def test_nearest_files_stand_next_to_the_target() -> None:
    """Imported by the target, then importing it, then by path; the farthest is left out."""
    files = [
        file("a/target.py", "from b.imported import x\n"),
        file("b/imported.py"),
        file("c/importer.py", "import a.target\n"),
        file("a/beside.py"),
        file("z/y/x/far.py"),
    ]
    seeds = (KeyedRandom(seed, "repository") for seed in range(100))
    first = next(one for seed in seeds if (one := make(files, 100, seed)[0]).target == 0)
    assert first.related == (4, 3, 2, 1)
    # Without the far file: 4 * 10 + 4 = 44 tokens.
    seeds = (KeyedRandom(seed, "repository") for seed in range(100))
    tight = next(made for seed in seeds if (made := make(files, 44, seed))[0].target == 0)
    assert tight[0].related == (3, 2, 1)
    assert tight[1] == Context(related=(), target=4)


def test_too_long_files_are_told_and_none_is_cut() -> None:
    """A file too long as it is, and one that is too long in FIM form alone."""
    files = [file("a.py", tokens=96), file("b.py", tokens=101), file("c.py", tokens=97)]
    assert cut(files, 100) == ([Context(related=(), target=0)], [1, 2])
    assert cut([], 9) == ([], [])
