"""`mellum2 data verify`: are the bytes of training data those that were written?

Reading checks sizes only: hashing a corpus takes minutes, and every rank opens it at each start.
Nor does a rerun of a plan hash the results of its stages; here they are looked at too.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.stage_bars import stage_bars
from mellum2_megatron.data.phase_record import PHASE_FILE
from mellum2_megatron.data.pipeline.tasks import MANIFEST, Result
from mellum2_megatron.data.prepared_folder import load_prepared
from mellum2_megatron.data.tokens.pack_files import PACKS_FILE, read_pack_folder
from mellum2_megatron.data.tokens.tokenizer import tokenizer_hash

logger = logging.getLogger(__name__)

_BLOCK = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """A file and what was written down of it.

    Attributes:
        path: the file.
        size: its bytes.
        sha256: their SHA-256, hexadecimal.
    """

    path: Path
    size: int
    sha256: str


def verify_data(folder: Path, *, progress: bool = True) -> tuple[int, int]:
    """Hash all files of training data; return their number and their bytes.

    Args:
        folder: packs, a phase of a corpus plan, the plan's folder (its stages' results included),
            or Megatron's format.
        progress: show a bar when standard error is a terminal.

    Raises:
        InputError: a file has other bytes than were written, or the folder is no training data.
            All damaged files are named.
    """
    # A phase's files are links to results of stage `packs`: each is read once.
    files = list({_identity(file.path): file for file in _recorded(folder)}.values())
    total = sum(file.size for file in files)
    damaged = []
    with stage_bars(progress, logger, unit="bytes") as start_stage:
        advance = start_stage("hashing", total)
        for file in files:
            digest = hashlib.sha256()
            with file.path.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
                    advance(len(block))
            if digest.hexdigest() != file.sha256:
                damaged.append(str(file.path))
    if damaged:
        raise InputError(
            "\n".join(damaged),
            rule="the bytes are not those that were written",
            fix="copy the file again; or remove the folder of that result, and run the plan again",
        )
    return len(files), total


def _recorded(folder: Path) -> Iterator[_File]:
    """Yield the files of the folder; their sizes are checked on the way."""
    if (folder / PACKS_FILE).is_file():
        yield from _of_packs(folder)
        return
    phases = [folder] if (folder / PHASE_FILE).is_file() else sorted(folder.glob("phase-*"))
    records = [record for phase in phases for record in sorted(phase.glob(f"*/{PACKS_FILE}"))]
    sources = [record.parent for record in records]
    manifests = sorted(folder.glob(f"*/*/{MANIFEST}"))
    if not sources and not manifests:
        prepared = load_prepared(folder)
        for split, facts in prepared.splits.items():
            yield _File(
                path=folder / f"{split}_document.bin",
                size=facts.bin_bytes,
                sha256=facts.bin_sha256,
            )
    for manifest in manifests:
        yield from _of_result(folder, manifest)
    for source in sources:
        yield from _of_packs(source)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _of_result(plan: Path, manifest: Path) -> Iterator[_File]:
    """Yield the files of a stage's result."""
    name = manifest.parent.relative_to(plan).as_posix()
    result = Result(name=name, stage=manifest.parent.parent.name, source="")
    result.check_files(plan)
    for file, facts in result.manifest(plan)["files"].items():
        yield _File(path=manifest.parent / file, size=facts["bytes"], sha256=facts["sha256"])


def _of_packs(folder: Path) -> Iterator[_File]:
    packs = read_pack_folder(folder, str(folder))
    for shards in packs.facts["splits"].values():
        for shard in shards:
            for suffix, facts in shard["files"].items():
                yield _File(
                    path=folder / f"{shard['name']}{suffix}",
                    size=facts["bytes"],
                    sha256=facts["sha256"],
                )
    tokenizer = folder / "tokenizer"
    here = (tokenizer / "tokenizer.json").is_file()
    if not here or tokenizer_hash(tokenizer) != packs.tokenizer["sha256"]:
        raise InputError(
            str(tokenizer),
            rule="it is not the tokenizer that these packs were encoded with",
            fix="copy that tokenizer to this place, or write the packs again",
        )
