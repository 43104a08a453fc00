"""Write `docs/keys.md` anew, after a change of a key or its docstring::

python -m tests.config.keys_page
"""

from __future__ import annotations

from mellum2_megatron.config.key_reference import keys_page
from tests import REPOSITORY

PAGE = REPOSITORY / "docs" / "keys.md"

if __name__ == "__main__":
    PAGE.write_text(keys_page(), encoding="utf-8")
