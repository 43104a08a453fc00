"""Random values for random keys: a refusal or a result, never a traceback.

The seed is fixed, so a failure repeats; another one in SEED tries other words.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import keys
from mellum2_megatron.planning.resolve import plan, resolve_run
from mellum2_megatron.planning.rules import check
from mellum2_megatron.upstream import megatron_arguments
from tests.cli.runner import BIG, TINY, mellum2

SEED = int(os.environ.get("SEED", "1"))
RECIPES = [TINY, "mellum2_tiny_long_context", BIG]
NUMBERS = (
    "0 1 -1 2 3 7 8 16 64 128 512 1000 8_192 131072 010 1:30 0x10 1e3 1e-3 0.5 nan inf".split()
)
NUMBERS += ["2147483647", "2147483648", "9" * 40, "9" * 5000, "1e400", "1e-400"]
WORDS = [
    "",
    "null",
    "none",
    "~",
    "true",
    "on",
    "x",
    "a b",
    "é",
    "\udcff",
    "a\nb",
    "a\0b",
    "..",
    "-x",
]
WORDS += [
    "/etc/passwd",
    "/nowhere",
    "/tmp",
    "*",
    "'",
    '"',
    "[",
    "(",
    "{}",
    "x" * 300,
    "full_attention",
]
WORDS += ["muon", "adam", "fp8", "te", "torch", "cosine", "yarn", "flex", "skip", "stop", "e4m3"]
LISTS = ["[]", "[[0,1]]", "[[0,4],[8,16]]", "[[1,/a]]", "[a,b]", "[[0,nan]]", "[[[", "[1, (a)/b]"]
LISTS += ["[full_attention,sliding_attention]", "[[0.5,a],[0.5,b]]", "3,5"]


def random_words(chance: random.Random) -> list[str]:
    known = [*keys(), "architecture", "layout", "foo"]
    words = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        value = chance.choice(chance.choice([NUMBERS, NUMBERS, WORDS, LISTS]))
        words.append(f"{chance.choice(known)}={value}")
    return words


@pytest.mark.parametrize("part", range(4))
def test_no_command_ends_with_a_traceback(part: int, tmp_path: Path) -> None:
    chance = random.Random(1000 * SEED + part)
    profile = tmp_path / "site.yaml"
    profile.write_text("account: nlp\n")
    launch = ["--profile", str(profile), "--render", "sbatch", "--dry-run"]
    codes = []
    for _ in range(30):
        recipe, words = chance.choice(RECIPES), random_words(chance)
        command = chance.choice(
            [
                ["train", recipe, *words, "--dry-run"],
                ["info", recipe, *words],
                ["doctor", recipe, *words],
                ["launch", "run", recipe, *words, *launch],
            ]
        )
        result = mellum2(*command)
        assert result.code in (0, 2), (command, result)
        assert "Traceback" not in result.out + result.err, command
        codes.append(result.code)
    assert 2 in codes, "some values are bad"


def test_what_passes_the_checks_makes_megatrons_arguments() -> None:
    chance = random.Random(SEED)
    passed = 0
    for _ in range(400):
        recipe, words = chance.choice(RECIPES), random_words(chance)
        try:
            run = resolve_run(recipe, words)
        except InputError:
            continue
        device, ranks = plan(run, "auto", None)
        if check(run, ranks, device, machine=False):
            continue
        passed += 1
        arguments = megatron_arguments(run, world_size=ranks, device=device)
        assert all(isinstance(word, str) and word for word in arguments), words
        # argparse takes a value that begins with a dash for an option.
        options = [word for word in arguments if word.startswith("-")]
        assert all(word.startswith("--") for word in options), (words, options)
        " ".join(arguments).encode()
    assert passed > 20
