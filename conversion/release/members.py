"""The members of the released family."""

from __future__ import annotations

from mellum2_megatron.common.errors import InputError, nearest

BASE_PRETRAIN = "base-pretrain"
"""The only member with the native context: all others come after the long-context stage."""

CHAT_MEMBERS = ("instruct-sft", "thinking-sft", "instruct", "thinking")
"""Members that need a chat template."""

MEMBERS = (BASE_PRETRAIN, "base", *CHAT_MEMBERS)
"""All members, in the order of training."""


def require_member(member: str) -> None:
    """Raise InputError unless ``member`` is one of `MEMBERS`."""
    if member not in MEMBERS:
        raise InputError(
            f"--member {member}",
            rule="no family member has that name",
            fix=nearest(member, MEMBERS),
        )
