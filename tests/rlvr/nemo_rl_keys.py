"""Write NeMo-RL's declared keys anew, from a checkout of it::

    python -m tests.rlvr.nemo_rl_keys CHECKOUT [COMMIT]

``COMMIT`` is for a tree without git.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mellum2_megatron.rlvr.nemo_rl.declared import FILE, commit_of
from mellum2_megatron.rlvr.nemo_rl.source_keys import SourceReader


def declared_keys(checkout: Path, commit: str) -> dict[str, object]:
    """Return the content of ``declared_keys.json``."""
    reader = SourceReader(checkout)
    keys = sorted(reader.keys())
    return {"commit": commit, "files": sorted(reader.files), "keys": keys}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    revision = sys.argv[2] if len(sys.argv) > 2 else commit_of(folder)
    FILE.write_text(json.dumps(declared_keys(folder, revision), indent=1) + "\n", encoding="utf-8")
