"""Import, export and round trip between Hugging Face folders and Megatron checkpoints, one tensor
at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from conversion.huggingface.folder import HfFolder, dtype_name, listed, tensor_bytes, torch_dtype
from conversion.jobs.exporting import ExportJob
from conversion.jobs.importing import ImportJob
from conversion.jobs.job import Checks
from conversion.jobs.mtp_stitching import StitchJob
from conversion.jobs.reports import ConversionPlan, ConversionReport, RoundTripReport
from conversion.jobs.workers import worker_count
from conversion.mapping import derive, megatron_shapes
from conversion.torch_dist.reader import TorchDistReader
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.checkpoint import CheckpointFolder, find_checkpoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Layout

PathLike = str | os.PathLike[str]


def import_hf(
    hf_path: PathLike,
    megatron_path: PathLike,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    layout: Layout | None = None,
    checks: Checks | None = None,
) -> ConversionReport:
    """Write the Megatron checkpoint of a Hugging Face folder: ``megatron_path/release`` and what
    belongs beside it.

    Args:
        hf_path: folder with config.json and safetensors, experts unfused or fused.
        megatron_path: folder to write; Megatron's ``--load`` takes it.
        dtype: ``bfloat16``, ``float16`` or ``float32`` to convert to; by default weights keep
            theirs, bit for bit.
        overwrite: replace an earlier import.
        workers: files written at a time; by default one a core.
        layout: a layout the model must fit; the checkpoint itself serves every layout.
        checks: what is looked at on the way; by default hashes, where there is a manifest, and
            finite values.

    Raises:
        InputError: the folder, the dtype, the layout or the target cannot be used; nothing was
            written.
        WorkError: writing failed; what was done waits to be continued by the same call.
    """
    wanted = torch_dtype(dtype) if dtype is not None else None
    count = worker_count(workers)
    with HfFolder.open(hf_path) as source:
        _check_layout(layout, source.architecture)
        checks = checks or Checks()
        return ImportJob(
            source, Path(megatron_path), wanted, workers=count, overwrite=overwrite, checks=checks
        ).run()


def plan_import(
    hf_path: PathLike,
    megatron_path: PathLike,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    layout: Layout | None = None,
    checks: Checks | None = None,
) -> ConversionPlan:
    """Return what `import_hf` would do; touches nothing, and raises what it would raise before
    reading weights."""
    wanted = torch_dtype(dtype) if dtype is not None else None
    count = worker_count(workers)
    with HfFolder.open(hf_path) as source:
        _check_layout(layout, source.architecture)
        checks = checks or Checks()
        return ImportJob(
            source, Path(megatron_path), wanted, workers=count, overwrite=overwrite, checks=checks
        ).plan()


def export_hf(
    megatron_path: PathLike,
    hf_path: PathLike,
    *,
    dtype: str | None = None,
    tokenizer: PathLike | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    checks: Checks | None = None,
) -> ConversionReport:
    """Write the Hugging Face folder of a Megatron checkpoint, in the released layout, ``mtp.*``
    included.

    Args:
        megatron_path: checkpoint folder, or one iteration inside it; optimizer state in it is left
            out.
        hf_path: folder to write.
        dtype: ``bfloat16``, ``float16`` or ``float32`` to convert to; by default weights keep
            theirs, bit for bit.
        tokenizer: folder to take tokenizer files from instead of the checkpoint's own.
        overwrite: replace an earlier export.
        workers: layers converted at a time; by default one a core.
        checks: what is looked at on the way; by default hashes, where there is a manifest, and
            finite values.

    Raises:
        InputError: the checkpoint, the dtype, the tokenizer or the target cannot be used; nothing
            was written.
        WorkError: writing failed; what was done waits to be continued by the same call.
    """
    return _export_job(megatron_path, hf_path, dtype, tokenizer, overwrite, workers, checks).run()


def plan_export(
    megatron_path: PathLike,
    hf_path: PathLike,
    *,
    dtype: str | None = None,
    tokenizer: PathLike | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    checks: Checks | None = None,
) -> ConversionPlan:
    """Return what `export_hf` would do; touches nothing, and raises what it would raise before
    reading weights."""
    return _export_job(megatron_path, hf_path, dtype, tokenizer, overwrite, workers, checks).plan()


def roundtrip(
    hf_path: PathLike, *, work_dir: PathLike | None = None, workers: int | None = None
) -> RoundTripReport:
    """Import and export ``hf_path`` and compare every tensor's bytes; nothing is kept.

    Args:
        work_dir: folder for the two temporary copies; the system's temporary folder by default.
        workers: as of `import_hf`.

    Raises:
        InputError: the folder cannot be converted.
        WorkError: writing failed.
    """
    start = time.monotonic()
    as_it_is = Checks(allow_nonfinite=True)
    with tempfile.TemporaryDirectory(prefix="mellum2-roundtrip-", dir=work_dir) as name:
        megatron, exported = Path(name) / "megatron", Path(name) / "hf"
        import_hf(hf_path, megatron, workers=workers, checks=as_it_is)
        export_hf(megatron, exported, workers=workers, checks=as_it_is)
        shutil.rmtree(megatron)
        with HfFolder.open(hf_path) as before, HfFolder.open(exported) as after:
            names = [source.name for entry in before.entries for source in entry.sources]
            differing = [
                name
                for name in names
                if before.dtype != after.dtype
                or tensor_bytes(before.tensor(name)) != tensor_bytes(after.tensor(name))
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


def stitch_mtp(
    source: PathLike,
    target: PathLike,
    output: PathLike,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    checks: Checks | None = None,
) -> ConversionReport:
    """Write ``output``: the model in ``target`` with the MTP head of ``source``; both stay as they
    are.

    Args:
        source: Hugging Face folder that has the MTP head.
        target: Hugging Face folder that lost it, whether or not its config.json still announces
            one.
        output: folder to write.
        overwrite: replace an earlier result.
        workers: as of `import_hf`.
        checks: as of `import_hf`.

    Raises:
        InputError: ``source`` has no head, ``target`` has one, or they are not the same model
            otherwise.
        WorkError: writing failed; what was done waits to be continued by the same call.
    """
    count = worker_count(workers)
    with HfFolder.open(source) as head, HfFolder.open(target, lost_mtp=True) as trunk:
        job = StitchJob(
            head, trunk, Path(output), workers=count, overwrite=overwrite, checks=checks or Checks()
        )
        return job.run()


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
        fits = (
            stored[1:] == shape[1:] and stored[0] >= shape[0] if key in padded else stored == shape
        )
        if not fits:
            wrong.append(f"{key} {list(stored)} (expected {list(shape)})")
    if wrong:
        raise InputError(
            f"{checkpoint.iteration_dir}: {listed(wrong)}",
            rule="shapes follow from architecture.json",
            fix=fix,
        )
    return reader


# ---------------------------------------------------------------------------------------------------------------------


def _export_job(
    megatron_path: PathLike,
    hf_path: PathLike,
    dtype: str | None,
    tokenizer: PathLike | None,
    overwrite: bool,
    workers: int | None,
    checks: Checks | None,
) -> ExportJob:
    wanted = torch_dtype(dtype) if dtype is not None else None
    count = worker_count(workers)
    checkpoint = find_checkpoint(megatron_path)
    return ExportJob(
        checkpoint,
        open_checkpoint(checkpoint),
        Path(hf_path),
        wanted,
        Path(tokenizer) if tokenizer is not None else None,
        workers=count,
        overwrite=overwrite,
        checks=checks or Checks(),
    )


def _check_layout(layout: Layout | None, architecture: Mellum2Architecture) -> None:
    """Refuse a layout that the model cannot be split to; the checkpoint itself is the same for
    all."""
    if layout is None:
        return
    sequence = architecture.max_position_embeddings
    layout.validate(architecture, world_size=layout.smallest_world_size, sequence_length=sequence)
