"""Makes the data sets of a study that are absent, each with its own command of `mellum2`."""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from ablations.asking.study import DataSet
from mellum2_megatron.common.console import print_line
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import write_text


def make_data(missing: Sequence[DataSet]) -> None:
    """Make data sets in order.

    Raises:
        InputError: one has no command.
        WorkError: a command fails.
    """
    for data in missing:
        if not data.command:
            raise InputError(
                f"data set {data.name}",
                rule=f"nothing makes it at this scale; it is {data.note}",
                fix=f"make {data.path}, or give --data {data.name}=DIR",
            )
    stdlib = sysconfig.get_path("stdlib")
    for data in missing:
        Path(data.path).parent.mkdir(parents=True, exist_ok=True)
        if data.plan:
            # Not str.format: a plan has braces of its own.
            write_text(f"{data.path}.yaml", data.plan.replace("{stdlib}", stdlib))
        words = [
            word.replace("{path}", data.path).replace("{stdlib}", stdlib)
            for word in shlex.split(data.command)
        ]
        print_line(f"$ {shlex.join(words)}")
        done = subprocess.run([sys.executable, "-m", "mellum2_megatron", *words[1:]], check=False)
        if done.returncode:
            raise WorkError(
                f"data set {data.name}: its command ended with exit code {done.returncode}",
                fix="follow its message above",
            )
