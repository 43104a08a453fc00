"""Files of a run beside its checkpoints: the resolved run, the architecture, the tokenizer."""

from __future__ import annotations

from pathlib import Path

from mellum2_megatron.checkpoint.folder import RUN_FILE, TOKENIZER_FOLDER, write_architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import atomic_directory, read_text, write_text
from mellum2_megatron.config import Run, from_yaml, to_yaml
from mellum2_megatron.data.tokens.tokenizer import copy_tokenizer


def write_run_folder(run: Run) -> None:
    """Write `run.yaml`, `architecture.json` and `tokenizer/` into the output folder.

    Each of the three is replaced in one step, so no reader finds it half-written.
    """
    root = output_folder(run)
    root.mkdir(parents=True, exist_ok=True)
    # A resume replaces run.yaml too, so the file describes the latest start.
    write_text(root / RUN_FILE, to_yaml(run))
    write_architecture(root, run.architecture)
    with atomic_directory(root / TOKENIZER_FOLDER, overwrite=True) as folder:
        copy_tokenizer(Path(run.data.tokenizer_folder), folder)


def read_run(path: Path) -> Run:
    """Read a resolved run.

    Raises:
        InputError: there is no such file, or it is not a resolved run.
    """
    text = read_text(path, f"run file {path}", fix="name a run.yaml")
    try:
        return from_yaml(text)
    except InputError as error:
        raise InputError(f"{path}: {error.value}", rule=error.rule, fix=error.fix) from None


def output_folder(run: Run) -> Path:
    """Return the folder that the run writes to.

    Raises:
        InputError: the run names none.
    """
    if run.checkpoint.output is None:
        raise InputError(
            "checkpoint.output=null",
            rule="a run writes its checkpoints somewhere",
            fix="give --output DIR",
        )
    return Path(run.checkpoint.output)
