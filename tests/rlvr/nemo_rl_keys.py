"""Write NeMo-RL's declared keys anew, from a checkout of it::

    python -m tests.rlvr.nemo_rl_keys CHECKOUT [COMMIT]

Nothing of it is imported: classes are read as text. ``COMMIT`` is for a tree without git.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mellum2_megatron.rlvr.nemo_rl.declared import FILE

ROOT = ("nemo_rl.algorithms.grpo", "MasterConfig")
MORE = {"policy.generation": ("nemo_rl.models.generation.vllm.config", "VllmConfig")}
"""Sections whose annotation is a base class -> the class that is used."""


@dataclass
class Reader:
    """Reads classes of configuration in a checkout.

    Attributes:
        checkout: the checkout.
        files: files that were read, relative to it.
    """

    checkout: Path
    files: set[str] = field(default_factory=set)

    def tree(self, module: str) -> ast.Module:
        path = self.checkout / Path(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        self.files.add(file.relative_to(self.checkout).as_posix())
        return ast.parse(file.read_text(encoding="utf-8"))

    def find(self, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """Return a class with its module, through imports from modules of NeMo-RL."""
        for node in self.tree(module).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_rl"):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(str(node.module), alias.name)
        return None

    def keys(self, module: str, name: str, prefix: str = "") -> Iterator[str]:
        """Yield the full keys of a class, of its bases and of the classes in its fields."""
        found = self.find(module, name)
        if found is None:
            return
        home, node = found
        for base in node.bases:
            if isinstance(base, ast.Name):
                yield from self.keys(home, base.id, prefix)
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            key = f"{prefix}{item.target.id}"
            yield key
            names = [one.id for one in ast.walk(item.annotation) if isinstance(one, ast.Name)]
            if "dict" in names or "Dict" in names or "Any" in names:
                yield f"{key}.*"
            for inner in names:
                yield from self.keys(home, inner, f"{key}.")


def declared_keys(checkout: Path, commit: str) -> dict[str, object]:
    """Return the content of ``declared_keys.json``."""
    reader = Reader(checkout)
    keys = set(reader.keys(*ROOT))
    for section, (module, name) in MORE.items():
        keys |= set(reader.keys(module, name, f"{section}."))
    return {"commit": commit, "files": sorted(reader.files), "keys": sorted(keys)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        revision = sys.argv[2]
    else:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    content = declared_keys(folder, revision.strip())
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
