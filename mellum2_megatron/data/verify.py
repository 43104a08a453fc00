"""`mellum2 data verify`: are the bytes of training data those that were written?

Reading checks sizes only: hashing a corpus takes minutes, and every rank opens it at each start.
Nor does a rerun of a plan hash the results of its stages; here they are looked at too.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.stage_bars import stage_bars
from mellum2_megatron.data.corpus.selection import SPLITS
from mellum2_megatron.data.phase_record import PHASE_FILE, PLAN_FILE, read_phase
from mellum2_megatron.data.pipeline.graph import STAGES
from mellum2_megatron.data.pipeline.plan_file import results_folder
from mellum2_megatron.data.pipeline.tasks import MANIFEST, Result
from mellum2_megatron.data.prepared_folder import load_prepared
from mellum2_megatron.data.tokens.pack_files import PACKS_FILE, read_pack_folder
from mellum2_megatron.data.tokens.tokenizer import tokenizer_hash

logger = logging.getLogger(__name__)

_BLOCK = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class _Written:
    """A file's length and hash when it was written.

    Attributes:
        size: bytes.
        sha256: their SHA-256, hexadecimal; None: it was not written down.
    """

    size: int
    sha256: str | None


@dataclass(kw_only=True, slots=True)
class _Audit:
    """The files of a folder, and what is wrong with them.

    Attributes:
        files: files as they were written; one with several names has its first here.
        faults: fault of each damaged file, by its path.
        seen: number on its disk of each file in ``files``.
    """

    files: dict[Path, _Written] = field(default_factory=dict)
    faults: dict[Path, str] = field(default_factory=dict)
    seen: set[tuple[int, int]] = field(default_factory=set)

    def add(self, path: Path, size: int, sha256: str | None) -> None:
        """Add a file; note the fault of one that is missing or has another length."""
        try:
            status = path.stat()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            self.faults[path] = "it is missing" if missing else first_line(error)
            return
        # A phase's files are links to results of stage `packs`: each is read once.
        identity = (status.st_dev, status.st_ino)
        if identity in self.seen:
            return
        self.seen.add(identity)
        self.files[path] = _Written(size=size, sha256=sha256)
        if not path.is_file():
            self.faults[path] = "it is no file"
        elif status.st_size != size:
            self.faults[path] = f"it should have {size:,} bytes and has {status.st_size:,}"

    def add_tokenizer(self, folder: Path, sha256: str) -> None:
        """Note the fault of a tokenizer that is another than the data were encoded with."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            self.faults[file] = "it is missing"
        elif tokenizer_hash(folder) != sha256:
            self.faults[file] = "it is not the tokenizer that the data were encoded with"


def verify_data(given: Path, *, progress: bool = True) -> tuple[Path, int, int]:
    """Hash all files of training data.

    Args:
        given: packs, a phase of a corpus plan, the plan's folder (its stages' results included) or
            its file, or Megatron's format.
        progress: show a bar when standard error is a terminal.

    Returns:
        The folder, the number of its files and their bytes.

    Raises:
        InputError: files are missing or have other bytes than were written, or it is no training
            data. Every damaged file is named.
    """
    folder = _results(given)
    audit = _Audit()
    _collect(folder, audit)
    whole = {path: file for path, file in audit.files.items() if path not in audit.faults}
    total = sum(file.size for file in whole.values())
    with stage_bars(progress, logger, unit="bytes") as start_stage:
        advance = start_stage("hashing", total)
        for path, file in whole.items():
            digest = hashlib.sha256()
            try:
                with path.open("rb") as stream:
                    while block := stream.read(_BLOCK):
                        digest.update(block)
                        advance(len(block))
            except OSError as error:
                audit.faults[path] = first_line(error)
                continue
            if file.sha256 is not None and digest.hexdigest() != file.sha256:
                audit.faults[path] = "it has other bytes of the same number"
    if audit.faults:
        lines = [f"{path}: {fault}" for path, fault in sorted(audit.faults.items())]
        raise InputError(
            str(folder),
            rule="\n  ".join([f"{len(lines)} damaged file(s)", *lines]),
            fix="copy them again; or remove the folder of each damaged result, and run the plan "
            "again",
        )
    return folder, len(audit.files), total


def _results(given: Path) -> Path:
    """Return the folder that a plan file means: its results; a folder as it is.

    Raises:
        InputError: the plan cannot be read, or has not run.
    """
    if not given.is_file():
        return given
    folder = results_folder(given)
    if not (folder / PLAN_FILE).is_file():
        raise InputError(
            str(given),
            rule=f"the plan has not run: {folder} has no results of it",
            fix=f"run it with `mellum2 data run {given}`",
        )
    return folder


def _collect(folder: Path, audit: _Audit) -> None:
    """Add the files of packs, of a phase, of a plan's results, or of Megatron's format."""
    if (folder / PACKS_FILE).is_file():
        _add_packs(folder, audit)
        return
    results = [one for stage in STAGES for one in sorted(folder.glob(f"{stage}/*/"))]
    phases = [folder] if (folder / PHASE_FILE).is_file() else sorted(folder.glob("phase-*/"))
    if not results and not phases:
        _add_prepared(folder, audit)
        return
    # Before the phases, so that a damaged file has the name of the result to remove.
    for result in results:
        if not result.name.startswith("."):  # unfinished
            _add_result(folder, result, audit)
    for phase in phases:
        _add_phase(phase, audit)


def _add_prepared(folder: Path, audit: _Audit) -> None:
    """Add the files of Megatron's format."""
    prepared = load_prepared(folder, name=str(folder), check_files=False)
    for split in SPLITS:
        facts = prepared.splits[split]
        audit.add(folder / f"{split}_document.bin", facts.bin_bytes, facts.bin_sha256)
        audit.add(folder / f"{split}_document.idx", facts.idx_bytes, None)
    audit.add_tokenizer(prepared.tokenizer_dir, prepared.tokenizer_sha256)


def _add_result(plan: Path, folder: Path, audit: _Audit) -> None:
    """Add the files of a stage's result."""
    name = folder.relative_to(plan).as_posix()
    result = Result(name=name, stage=folder.parent.name, source="")
    try:
        files = {
            folder / file: (int(facts["bytes"]), str(facts["sha256"]))
            for file, facts in result.manifest(plan)["files"].items()
        }
    except InputError as error:
        audit.faults[folder / MANIFEST] = error.rule
    except (KeyError, TypeError, ValueError, AttributeError):
        audit.faults[folder / MANIFEST] = "it lists no files"
    else:
        for path, facts in files.items():
            audit.add(path, *facts)


def _add_phase(folder: Path, audit: _Audit) -> None:
    """Add the packs of each source of a phase, and the plan's tokenizer."""
    sources = {record.parent.name for record in folder.glob(f"*/{PACKS_FILE}")}
    number = folder.name.removeprefix("phase-")
    if not (folder / PHASE_FILE).is_file():
        audit.faults[folder / PHASE_FILE] = "it is missing"
    elif number.isascii() and number.isdigit():  # else it was renamed
        try:
            sources |= read_phase(folder.parent, int(number)).shares.keys()
        except InputError as error:
            audit.faults[folder / PHASE_FILE] = error.rule
    for source in sorted(sources):
        sha256 = _add_packs(folder / source, audit)
        kept = folder.parent / "tokenizer"
        if sha256 is not None and kept.is_dir():
            audit.add_tokenizer(kept, sha256)


def _add_packs(folder: Path, audit: _Audit) -> str | None:
    """Add the files of a folder of packs; return the hash of its tokenizer if it can be read."""
    try:
        packs = read_pack_folder(folder, str(folder), check_files=False)
        files = {
            folder / f"{shard['name']}{suffix}": (int(facts["bytes"]), str(facts["sha256"]))
            for shards in packs.facts["splits"].values()
            for shard in shards
            for suffix, facts in shard["files"].items()
        }
        sha256 = str(packs.tokenizer["sha256"])
    except InputError as error:
        audit.faults[folder / PACKS_FILE] = error.rule
        return None
    except (KeyError, TypeError, ValueError) as error:
        audit.faults[folder / PACKS_FILE] = f"it is damaged ({error!r})"
        return None
    for path, facts in files.items():
        audit.add(path, *facts)
    audit.add_tokenizer(folder / "tokenizer", sha256)
    return sha256
