"""Import, export and round trip between Hugging Face folders and Megatron checkpoints, one tensor at a time."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from conversion.hf_folder import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    HfFolder,
    check_inside,
    dtype_name,
    listed,
    read_json,
    tensor_bytes,
    torch_dtype,
)
from conversion.hf_writer import copy_tokenizer, plan_shards, write_index, write_shard
from conversion.manifest import WeightRecord, write_manifest
from conversion.mapping import Entry, derive, extra_states, megatron_shapes
from conversion.progress import byte_progress
from conversion.target import result_folder
from conversion.torch_dist import Chunk, TorchDistReader, TorchDistWriter
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.checkpoint_folder import (
    RELEASE,
    TOKENIZER_FOLDER,
    CheckpointFolder,
    resolve,
    write_architecture,
    write_tracker,
)
from mellum2_megatron.errors import InputError
from mellum2_megatron.files import size_text, write_json

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

# What Megatron's load of a release looks at (training/checkpointing.py:load_checkpoint, 0.19.2): version 3 keeps it
# from reordering linear_qkv; the content metadata names the key layout written here.
COMMON_STATE = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """What a conversion wrote: Hugging Face tensors counted, bytes of weights, seconds of wall time."""

    path: Path
    architecture: Mellum2Architecture
    dtype: str
    tensors: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        return f"wrote {self.path}: {_amount(self.tensors, self.nbytes, self.dtype)} in {self.seconds:.1f} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTripReport:
    """What import followed by export did to a folder: ``differing`` names every tensor whose bytes changed."""

    path: Path
    dtype: str
    tensors: int
    nbytes: int
    seconds: float
    differing: tuple[str, ...]
    same_architecture: bool

    @property
    def ok(self) -> bool:
        return not self.differing and self.same_architecture

    def __str__(self) -> str:
        done = f"{self.path}: {_amount(self.tensors, self.nbytes, self.dtype)} there and back in {self.seconds:.1f} s"
        if self.ok:
            return f"{done}, every byte the same"
        changed = [*self.differing, *([] if self.same_architecture else [CONFIG_FILE])]
        return f"{done}, {len(changed)} changed: {listed(changed, 10)}"


def import_hf(
    hf_path: PathLike, megatron_path: PathLike, *, dtype: str | None = None, overwrite: bool = False
) -> ConversionReport:
    """Write the Megatron checkpoint of a Hugging Face folder: ``megatron_path/release`` and what belongs beside it.

    Args:
        hf_path: folder with config.json and safetensors, experts unfused or fused.
        megatron_path: folder to write; Megatron's ``--load`` takes it.
        dtype: ``bfloat16``, ``float16`` or ``float32`` to convert to; by default weights keep theirs, bit for bit.
        overwrite: replace an earlier import.

    Raises:
        InputError: the folder, the dtype or the target cannot be used; nothing was written.
        WorkError: writing failed; nothing was left behind.
    """
    start, target = time.monotonic(), Path(megatron_path)
    wanted = torch_dtype(dtype) if dtype is not None else None
    with HfFolder.open(hf_path) as source:
        stored = wanted or source.dtype
        nbytes = _nbytes(source.entries, stored)
        records: list[WeightRecord] = []
        with (
            result_folder(target, source=source.path, nbytes=nbytes, overwrite=overwrite) as folder,
            byte_progress("import", nbytes) as advance,
        ):
            release = folder / RELEASE
            release.mkdir()
            chunks = [(entry.group, _chunk(entry, source, stored, records, advance)) for entry in source.entries]
            groups = [[chunk for _, chunk in group] for _, group in groupby(chunks, key=lambda pair: pair[0])]
            TorchDistWriter(release).write(groups, common=COMMON_STATE, empty_states=extra_states(source.architecture))
            write_manifest(release, records)
            write_architecture(folder, source.architecture)
            copy_tokenizer(source.path, folder / TOKENIZER_FOLDER)
            _copy_generation_config(source.path, folder)
            write_tracker(folder, None)
        return _report(target, source.architecture, source.entries, stored, start)


def export_hf(
    megatron_path: PathLike,
    hf_path: PathLike,
    *,
    dtype: str | None = None,
    tokenizer: PathLike | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Write the Hugging Face folder of a Megatron checkpoint, in the released layout, ``mtp.*`` included.

    Args:
        megatron_path: checkpoint folder, or one iteration inside it; optimizer state in it is left out.
        hf_path: folder to write.
        dtype: ``bfloat16``, ``float16`` or ``float32`` to convert to; by default weights keep theirs, bit for bit.
        tokenizer: folder to take tokenizer files from instead of the checkpoint's own.
        overwrite: replace an earlier export.

    Raises:
        InputError: the checkpoint, the dtype, the tokenizer or the target cannot be used; nothing was written.
        WorkError: writing failed; nothing was left behind.
    """
    start, target = time.monotonic(), Path(hf_path)
    wanted = torch_dtype(dtype) if dtype is not None else None
    checkpoint = resolve(megatron_path)
    entries = derive(checkpoint.architecture)
    reader = open_checkpoint(checkpoint)
    stored = wanted or _one_dtype(reader)
    tokenizer_dir = _tokenizer_dir(checkpoint, tokenizer)
    nbytes = _nbytes(entries, stored)
    records: list[WeightRecord] = []

    with (
        result_folder(target, source=checkpoint.root, nbytes=nbytes, overwrite=overwrite) as folder,
        byte_progress("export", nbytes) as advance,
    ):

        def tensors(entry: Entry) -> Iterator[tuple[str, torch.Tensor]]:
            whole = reader.read(entry.key, entry.offset, entry.extent).reshape(entry.shape).to(stored)
            parts = entry.transform.split(whole, checkpoint.architecture)
            for source, part in zip(entry.sources, parts, strict=True):
                records.append(WeightRecord.of(source.name, part))
                yield source.name, part
            advance(whole.nbytes)

        shards = plan_shards(entries, stored)
        for shard in shards:
            write_shard(folder, shard, stored, tensors)
        write_index(folder, shards, stored)
        write_manifest(folder, records)
        write_json(folder / CONFIG_FILE, checkpoint.architecture.to_hf_config(dtype_name(stored)))
        if not _copy_generation_config(checkpoint.root, folder):
            write_json(folder / GENERATION_CONFIG_FILE, generation_config(checkpoint.architecture))
        if tokenizer_dir is None or not copy_tokenizer(tokenizer_dir, folder):
            logger.info("%s has no tokenizer, so %s has none either", checkpoint.root, target)
    return _report(target, checkpoint.architecture, entries, stored, start)


def roundtrip(hf_path: PathLike, *, work_dir: PathLike | None = None) -> RoundTripReport:
    """Import and export ``hf_path`` and compare every tensor's bytes; nothing is kept.

    Args:
        work_dir: folder for the two temporary copies; the system's temporary folder by default.

    Raises:
        InputError: the folder cannot be converted.
        WorkError: writing failed.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mellum2-roundtrip-", dir=work_dir) as name:
        megatron, exported = Path(name) / "megatron", Path(name) / "hf"
        import_hf(hf_path, megatron)
        export_hf(megatron, exported)
        shutil.rmtree(megatron)
        with HfFolder.open(hf_path) as before, HfFolder.open(exported) as after:
            names = [source.name for entry in before.entries for source in entry.sources]
            differing = [
                name
                for name in names
                if before.dtype != after.dtype or tensor_bytes(before.tensor(name)) != tensor_bytes(after.tensor(name))
            ]
            return RoundTripReport(
                path=before.path,
                dtype=dtype_name(before.dtype),
                tensors=len(names),
                nbytes=before.nbytes,
                seconds=time.monotonic() - start,
                differing=tuple(differing),
                same_architecture=before.architecture == after.architecture,
            )


def open_checkpoint(checkpoint: CheckpointFolder) -> TorchDistReader:
    """Open a checkpoint's weights and check them against its architecture.

    Raises:
        InputError: weights missing, extra or misshapen for the architecture beside the checkpoint.
    """
    reader = TorchDistReader(checkpoint.iteration_dir)
    entries = derive(checkpoint.architecture)
    expected = megatron_shapes(entries)
    fix = "give a checkpoint whose architecture.json is its own"
    if missing := sorted(set(expected) - set(reader.tensors)):
        raise InputError(
            f"{checkpoint.iteration_dir}: {listed(missing)} missing",
            rule="architecture.json describes a model that has them",
            fix=fix,
        )
    if extra := sorted(set(reader.tensors) - set(expected)):
        raise InputError(
            f"{checkpoint.iteration_dir}: {listed(extra)} not part of the model",
            rule="architecture.json describes a model without them",
            fix=fix,
        )
    padded = {entry.key for entry in entries if entry.padded_vocabulary}
    wrong = []
    for key, shape in expected.items():
        stored = reader.tensors[key].shape
        fits = stored[1:] == shape[1:] and stored[0] >= shape[0] if key in padded else stored == shape
        if not fits:
            wrong.append(f"{key} {list(stored)} (expected {list(shape)})")
    if wrong:
        raise InputError(
            f"{checkpoint.iteration_dir}: {listed(wrong)}", rule="shapes follow from architecture.json", fix=fix
        )
    return reader


def generation_config(architecture: Mellum2Architecture) -> dict[str, object]:
    """Return the generation_config.json that transformers would derive from the model's own config."""
    ids = {
        "bos_token_id": architecture.bos_token_id,
        "eos_token_id": list(architecture.eos_token_id)
        if isinstance(architecture.eos_token_id, tuple)
        else architecture.eos_token_id,
        "pad_token_id": architecture.pad_token_id,
    }
    return {"_from_model_config": True, **{name: value for name, value in ids.items() if value is not None}}


# ---------------------------------------------------------------------------------------------------------------------


def _chunk(
    entry: Entry, source: HfFolder, dtype: torch.dtype, records: list[WeightRecord], advance: Callable[[int], None]
) -> Chunk:
    def produce() -> torch.Tensor:
        parts = [source.tensor(part.name).to(dtype) for part in entry.sources]
        whole = entry.transform.join(parts, source.architecture)
        records.append(WeightRecord.of(entry.label, whole))
        advance(whole.nbytes)
        return whole

    return Chunk(
        key=entry.key,
        global_shape=entry.global_shape,
        offset=entry.offset,
        extent=entry.extent,
        dtype=dtype,
        produce=produce,
    )


def _amount(tensors: int, nbytes: int, dtype: str) -> str:
    return f"{tensors} tensors, {size_text(nbytes)} {dtype}"


def _nbytes(entries: list[Entry], dtype: torch.dtype) -> int:
    return sum(torch.Size(entry.shape).numel() for entry in entries) * dtype.itemsize


def _one_dtype(reader: TorchDistReader) -> torch.dtype:
    """The dtype all weights share; a mixed checkpoint needs the caller's choice."""
    by_dtype: dict[torch.dtype, list[str]] = {}
    for key, tensor in reader.tensors.items():
        by_dtype.setdefault(tensor.dtype, []).append(key)
    if len(by_dtype) > 1:
        raise InputError(
            f"{reader.folder}: weights in "
            + ", ".join(f"{dtype_name(d)} ({listed(k, 1)})" for d, k in by_dtype.items()),
            rule="a Hugging Face folder has one dtype",
            fix="choose it: --torch-dtype bfloat16",
        )
    dtype = next(iter(by_dtype))
    torch_dtype(dtype_name(dtype))
    return dtype


def _tokenizer_dir(checkpoint: CheckpointFolder, given: PathLike | None) -> Path | None:
    folder = Path(given) if given is not None else checkpoint.tokenizer_dir
    if folder is None:
        return None
    if not (folder / "tokenizer.json").is_file():
        if given is None:
            return folder
        raise InputError(
            f"tokenizer {folder}", rule="it must be a folder with a tokenizer.json", fix="give a tokenizer folder"
        )
    from tokenizers import Tokenizer

    top = max(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values(), default=-1)
    if top >= checkpoint.architecture.vocab_size:
        raise InputError(
            f"tokenizer {folder} has token id {top}",
            rule=f"the model's vocabulary has {checkpoint.architecture.vocab_size} entries",
            fix="give the tokenizer the model was trained with",
        )
    return folder


def _copy_generation_config(source: Path, target: Path) -> bool:
    path = source / GENERATION_CONFIG_FILE
    if not path.is_file():
        return False
    check_inside(source, path)
    read_json(path, "it was just there")
    shutil.copyfile(path, target / GENERATION_CONFIG_FILE)
    return True


def _report(
    path: Path, architecture: Mellum2Architecture, entries: list[Entry], dtype: torch.dtype, start: float
) -> ConversionReport:
    return ConversionReport(
        path=path,
        architecture=architecture,
        dtype=dtype_name(dtype),
        tensors=sum(len(entry.sources) for entry in entries),
        nbytes=_nbytes(entries, dtype),
        seconds=time.monotonic() - start,
    )
