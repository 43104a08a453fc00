"""Import of a Hugging Face folder that `checkpoint.load` names, once and before any rank starts.

The import is kept in ``imported/`` beside the run folder, on the disk that the ranks write to, and
under a name made of the folder's content: the next run that loads the same weights reuses it.
It happens where the command runs. For a Slurm job that is before the submission, so that no GPU
waits for it and a refusal comes at once.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.architecture import find_architecture
from mellum2_megatron.checkpoint.file_manifest import hash_files
from mellum2_megatron.checkpoint.folder import ROTATION, names_checkpoint
from mellum2_megatron.common.byte_progress import byte_progress
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import remove_directory, size_text, write_json
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.common.model_folders import kind_of, refuse_lfs_pointers
from mellum2_megatron.config import Run

IMPORTS_VARIABLE = "MELLUM2_IMPORTS"
"""Environment variable: folder of the imports; default ``imported`` beside the run folder."""

_LARGE = 2 * 10**9
"""Bytes from which hashing shows a bar, and the message warns of minutes."""
_HASHES_FILE = ".hashes.json"
_SUFFIXES = frozenset((".safetensors", ".json", ".jinja", ".model", ".txt"))

Signature = Mapping[str, tuple[int, int]]
"""Size and time of change (ns) of each file by name: whether a hash must be computed again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsImport:
    """An import that a run needs.

    Attributes:
        source: Hugging Face folder, absolute.
        target: folder of the import, absolute.
        digest: SHA-256 of the content of ``source``.
        signature: files of ``source`` when it was hashed.
    """

    source: Path
    target: Path
    digest: str
    signature: Signature

    @property
    def done(self) -> bool:
        """True if the import is complete."""
        return names_checkpoint(self.target)

    @property
    def nbytes(self) -> int:
        """Size of the source, bytes."""
        return sum(size for size, _ in self.signature.values())

    def line(self) -> str:
        """Return one line: what is or will be where, and how large it is."""
        if self.done:
            return f"checkpoint.load: {self.source} was imported before, taking {self.target}"
        line = (
            f"checkpoint.load: importing the Hugging Face folder {self.source} into {self.target}, "
            f"{size_text(self.nbytes)}, which stay there for the next run "
            f"({IMPORTS_VARIABLE} names another place)"
        )
        if self.nbytes >= _LARGE:
            line += (
                "; this takes minutes. Where this machine limits programs, run it elsewhere first: "
                f"mellum2 convert import --hf-path {self.source} --megatron-path {self.target}"
            )
        return line

    def run(self) -> None:
        """Import, unless it is done. Of several starts at a time one imports, the others wait.

        Raises:
            InputError: the folder cannot be converted.
            WorkError: writing failed, or the folder changed meanwhile.
        """
        sys.stderr.write(f"{self.line()}\n")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        lock_file = self.target.parent / f".{self.target.name}.lock"
        if self.done:
            self._remember()
            lock_file.unlink(missing_ok=True)
            return
        # Here: it loads torch, which no other part of this module needs.
        from conversion.convert import import_hf

        with lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.done:
                return
            import_hf(self.source, self.target)
            if _signature(self.source) != self.signature:
                remove_directory(self.target)
                raise WorkError(
                    f"{self.source} changed while it was imported",
                    fix="start again when it is complete",
                )
        self._remember()
        # Whoever still waits for it finds the import done.
        lock_file.unlink(missing_ok=True)

    def _remember(self) -> None:
        """Keep the hash for later starts; a lost entry costs one hashing."""
        known = _known_hashes(self.target.parent)
        entry = _entry(self.signature, self.digest)
        if known.get(str(self.source)) != entry:
            write_json(self.target.parent / _HASHES_FILE, {**known, str(self.source): entry})


def plan_weights(run: Run, imports: Path) -> tuple[Run, WeightsImport | None]:
    """Return the run with `checkpoint.load` on a Megatron checkpoint, and the import that it needs.

    A run that names no Hugging Face folder comes back unchanged, without an import.

    Args:
        run: a resolved run.
        imports: folder of the imports, see `imports_folder`.

    Raises:
        InputError: the folder's model is another than the run's, or its files are incomplete.
    """
    source = huggingface_source(run)
    if source is None:
        return run, None
    signature = _signature(source)
    digest = _digest(source, signature, imports)
    target = Path(os.path.abspath(imports)) / f"{source.name}-{digest[:12]}"
    given = run.sources.get("checkpoint.load", "recipe")
    changed = dataclasses.replace(
        run,
        checkpoint=dataclasses.replace(run.checkpoint, load=str(target)),
        sources={
            **run.sources,
            "checkpoint.load": f"{given}; imported from {source}, sha256 {digest}",
        },
    )
    return changed, WeightsImport(source=source, target=target, digest=digest, signature=signature)


def huggingface_source(run: Run) -> Path | None:
    """Return the Hugging Face folder that a run loads, absolute; None if it loads none.

    Reads config.json and the names of the files.

    Raises:
        InputError: the folder's model is another than the run's, or its files are incomplete.
    """
    if run.checkpoint.load is None:
        return None
    source = Path(os.path.abspath(Path(run.checkpoint.load).expanduser()))
    if kind_of(source) != "huggingface":
        return None
    _require_same_model(run, source)
    files = _files(source)
    refuse_lfs_pointers(files)
    if not any(file.suffix == ".safetensors" for file in files):
        raise InputError(
            f"checkpoint.load={run.checkpoint.load}",
            rule="holds a config.json and no weights (*.safetensors)",
            fix="download it completely; architecture=FOLDER takes the architecture alone",
        )
    return source


def imports_folder(run_folder: Path) -> Path:
    """Return the folder of the imports: that of `IMPORTS_VARIABLE`, else beside the run folder."""
    named = os.environ.get(IMPORTS_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.path.abspath(run_folder)).parent / "imported"


def without_load(run: Run) -> Run:
    """Return the run without `checkpoint.load`, for checks before the import exists."""
    return dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, load=None))


def _require_same_model(run: Run, source: Path) -> None:
    there, here = find_architecture(str(source))[0].to_dict(), run.architecture.to_dict()
    differing = [
        f"{name}: {there[name]!r} there, {here[name]!r} here"
        for name in here
        if there[name] != here[name] and name not in ROTATION
    ]
    if differing:
        raise InputError(
            f"checkpoint.load={run.checkpoint.load}",
            rule="holds another architecture (" + "; ".join(differing) + ")",
            fix=f"add architecture={run.checkpoint.load}",
        )


def _files(source: Path) -> list[Path]:
    """Return the files that an import reads or copies, sorted by name."""
    return sorted(file for file in source.iterdir() if file.suffix in _SUFFIXES and file.is_file())


def _signature(source: Path) -> Signature:
    stats = {file.name: file.stat() for file in _files(source)}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _digest(source: Path, signature: Signature, imports: Path) -> str:
    """Return the SHA-256 of a folder's content; an earlier start's if no file has changed since."""
    # Hashing 24 GB takes a minute, which each start of a run would pay again.
    known = _known_hashes(imports).get(str(source))
    if isinstance(known, dict) and known == _entry(signature, str(known.get("sha256"))):
        return str(known["sha256"])
    files, total = _files(source), sum(size for size, _ in signature.values())
    if total < _LARGE:
        records = hash_files(files)
    else:
        with byte_progress(f"hashing {source.name}", total) as advance:
            records = hash_files(files, advance=advance)
    text = "".join(f"{name} {records[name].sha256}\n" for name in sorted(records))
    return hashlib.sha256(text.encode()).hexdigest()


def _entry(signature: Signature, digest: str) -> dict[str, object]:
    """Return a folder's entry in the file of hashes, as JSON types."""
    return {"files": {name: list(state) for name, state in signature.items()}, "sha256": digest}


def _known_hashes(imports: Path) -> dict[str, object]:
    try:
        return load_json(imports / _HASHES_FILE)
    except (OSError, ValueError):
        return {}
