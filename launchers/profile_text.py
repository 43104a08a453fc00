"""Checks of a profile's text: what would break the batch script, or give a secret away in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mellum2_megatron.common.errors import shown
from mellum2_megatron.common.field_checks import require, require_text
from mellum2_megatron.common.secret_names import is_secret_name, mask_secrets

SCRIPT_VARIABLES = frozenset(
    # Of the batch script (job_template.sh, sbatch.py).
    "folder head_node name container agent outcome told signals step heard code job next waiting "
    "on MASTER_ADDR MASTER_PORT MELLUM2_SERIES "
    # Of Slurm, as far as the script and our programs read them.
    "SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES SLURM_NODEID SLURM_RESTART_COUNT "
    "SLURMD_NODENAME SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID "
    # Of the ranks' launcher, and of bash.
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE "
    "BASHOPTS BASH_ENV ENV EUID IFS PPID SHELLOPTS UID".split()
)
"""Variables that a profile must not set."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_IN_SHELL = "set it in your shell and list its name: environment: [{}]"


def check_text(texts: Mapping[str, str]) -> None:
    """Refuse text with control characters, which would end a line of the script, and secrets.

    Args:
        texts: text by its key in the profile.

    Raises:
        InputError: see above.
    """
    for key, text in texts.items():
        _refuse_secret(key, text)
        require_text(key, text)


def check_script(lines: Sequence[str]) -> None:
    """Refuse secrets and NUL in lines of bash.

    Raises:
        InputError: see above.
    """
    for line in lines:
        _refuse_secret("setup", line)
        require(
            "\0" not in line, f"setup: {shown(line)}", rule="bash takes no NUL", fix="remove it"
        )


def _refuse_secret(key: str, text: str) -> None:
    masked = mask_secrets(text)
    require(
        masked == text,
        f"{key}: {shown(masked)}",
        rule="holds a secret, which no file or script should",
        fix=_IN_SHELL.format("NAME"),
    )


def check_variables(environment: Sequence[str], variables: Mapping[str, str]) -> None:
    """Refuse variables that are no names, that the script sets itself, or that hold a secret.

    Args:
        environment: names that jobs take from the submitting shell.
        variables: other variables with their values. No message shows a value, because a secret may
            stand there by mistake.

    Raises:
        InputError: see above.
    """
    for name in (*environment, *variables):
        require(
            _VARIABLE.fullmatch(name) is not None,
            f"variable {name.partition('=')[0]!r}",
            rule="is no name of a variable" if "=" not in name else "is listed with a value",
            fix="list names alone under environment, and NAME: value under variables",
        )
        require(
            name not in SCRIPT_VARIABLES and not name.startswith(("TORCHELASTIC_", "BASH_")),
            f"variable {name}",
            rule="is set by the batch script, by Slurm or by bash itself",
            fix="leave it out, or take another name",
        )
    for name, value in variables.items():
        require(
            not is_secret_name(name),
            f"variables.{name}",
            rule="looks like a secret, which no file or script should hold",
            fix=_IN_SHELL.format(name),
        )
        require(
            mask_secrets(value) == value,
            f"variables.{name}",
            rule="holds an address with a password or another secret",
            fix=_IN_SHELL.format(name),
        )
        require(
            value.isprintable(),
            f"variables.{name}",
            rule="must be one line of text",
            fix="write it in one line",
        )
        require(
            name not in environment,
            f"{name} under environment and variables",
            rule="it comes from the shell or from the profile",
            fix="drop one of the two",
        )
