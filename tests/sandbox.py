"""The sandbox of rewards in tests: a mark that skips with the reason, and an order not to."""

from __future__ import annotations

import os

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.rlvr.rewards.sandbox import find_sandbox


def _why_not() -> str:
    try:
        find_sandbox()
    except InputError as error:
        # One that starts and keeps nothing in is our fault, not the machine's: its tests must fail.
        return "" if "is no sandbox" in error.value else str(error)
    return ""


_REASON = _why_not()
if os.environ.get("MELLUM2_REQUIRE_SANDBOX") == "1" and _REASON:
    raise RuntimeError(f"MELLUM2_REQUIRE_SANDBOX=1, and there is no sandbox: {_REASON}")

needs_sandbox = pytest.mark.skipif(bool(_REASON), reason=_REASON)
