"""Write the table of keys in `docs/corpus_plans.md` anew, after a change of a plan's classes::

python -m tests.data.plan_keys_table
"""

from __future__ import annotations

from mellum2_megatron.data.pipeline.plan_keys import plan_keys_table
from tests import REPOSITORY

PAGE = REPOSITORY / "docs" / "corpus_plans.md"
HEADING = "\n## All keys\n"
INTRODUCTION = """
`python -m tests.data.plan_keys_table` makes these tables from the docstrings of the plan's
classes: change those. A key at another place is refused, and the message names its own.

"""


def with_table(page: str) -> str:
    """Return the page with the tables of keys at its end."""
    return page.partition(HEADING)[0] + HEADING + INTRODUCTION + plan_keys_table()


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
