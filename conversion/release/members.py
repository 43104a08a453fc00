"""The members of the released family."""

from __future__ import annotations

import re

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


_STAGES = {
    "long_context": "base",
    "sft_instruct": "instruct-sft",
    "sft_thinking": "thinking-sft",
    "rlvr_instruct": "instruct",
    "rlvr_thinking": "thinking",
}
"""Member that each stage trains, by the stage's part of a recipe's name."""


def check_member_of_run(member: str, name: str) -> None:
    """Refuse a member that another stage trains.

    Args:
        member: one of `MEMBERS`.
        name: the run's name, such as ``mellum2_12b_sft_instruct``. One without a stage's name
            in it may be any member.

    Raises:
        InputError: the run trained another member.
    """
    for stage, trained in _STAGES.items():
        if re.search(rf"(^|_){stage}(_|$)", name) and member != trained:
            raise InputError(
                f"--member {member}",
                rule=f"the checkpoint is of the run {name}, which trains {trained}",
                fix=f"release it with --member {trained}, or name the other run's folder",
            )
