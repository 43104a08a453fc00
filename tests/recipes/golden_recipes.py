"""SHA-256 of every recipe's run.yaml, so that no value or source changes unnoticed.

After a change that is meant, write them anew and look at the lines that differ::

    python -m tests.recipes.golden_recipes
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from mellum2_megatron.config import to_yaml
from mellum2_megatron.recipes import recipe, recipe_names

GOLDEN = Path(__file__).parent / "golden" / "recipes.sha256"


def digests() -> str:
    """Return one line for each recipe, as ``sha256sum`` writes them."""
    lines = []
    for name in recipe_names():
        digest = hashlib.sha256(to_yaml(recipe(name)).encode()).hexdigest()
        lines.append(f"{digest}  {name}.yaml\n")
    return "".join(lines)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(digests(), encoding="utf-8")
