"""The members of the released family."""

from __future__ import annotations

from mellum2_megatron.common.errors import InputError, nearest

BASE_PRETRAIN = "base-pretrain"


CHAT_MEMBERS = ("instruct-sft", "thinking-sft", "instruct", "thinking")


MEMBERS = (BASE_PRETRAIN, "base", *CHAT_MEMBERS)


def require_member(member: str) -> None:
    """Refuse a name that is no family member's."""
    if member not in MEMBERS:
        raise InputError(
            f"--member {member}",
            rule="no family member has that name",
            fix=nearest(member, MEMBERS),
        )
